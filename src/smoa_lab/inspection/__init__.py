"""What an adapter changed in each layer."""
