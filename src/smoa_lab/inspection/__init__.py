"""What an adapter did to each layer."""
