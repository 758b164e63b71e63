"""Base models, and the packages that a run needs."""
