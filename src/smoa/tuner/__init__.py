"""PEFT's tuner for SMoA, and what acts on several layers or adapters at once."""
