"""Scores of held-out rows, and how sure a difference between runs is."""
