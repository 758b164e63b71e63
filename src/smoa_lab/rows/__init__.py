"""A user's own rows: read, recognised, turned into tokens, and kept on disk for training."""
