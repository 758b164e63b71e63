"""The YAML file of a run: reading and checking it."""
