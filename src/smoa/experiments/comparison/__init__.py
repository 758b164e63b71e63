"""Comparing methods fairly: the same tuning for each, fresh seeds after it, differences with their intervals."""
