"""Training runs, from config to folder."""
