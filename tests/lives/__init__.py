"""A machine that looks for faults: lives of adapters, drawn by Hypothesis, against an oracle (`make states`)."""
