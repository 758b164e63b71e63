"""`smoa serve`."""
