"""What the commands do with runs and adapters: score, merge, convert and verify them, and size new ones."""
