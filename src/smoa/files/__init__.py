"""Saved adapters: names of tensors, checks, reading and writing."""
