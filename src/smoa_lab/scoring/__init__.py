"""Scores on held-out records."""
