"""What runs learn from and are judged by: questions, or a user's own rows."""
