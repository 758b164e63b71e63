"""Studies: methods tuned in the same way and compared."""
