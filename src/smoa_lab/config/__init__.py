"""The YAML of a run, checked as a whole."""
