"""Scores on held-out questions."""
