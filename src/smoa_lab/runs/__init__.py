"""What is done with a finished run: scored, merged, converted, verified."""
