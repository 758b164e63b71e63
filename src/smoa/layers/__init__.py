"""Adapted layers: what they remember, and how they compute, merge and unmerge."""
