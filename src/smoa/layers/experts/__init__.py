"""Experts of mixtures: parameters that hold one matrix for each expert, or two."""
