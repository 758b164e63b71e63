"""Where the records of each task come from."""
