"""Tasks and their records."""
