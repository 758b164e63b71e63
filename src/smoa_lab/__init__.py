"""The lab: trains, scores, compares, inspects, merges and converts adapters; the `smoa` command."""
