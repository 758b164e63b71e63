"""The charts of studies."""
