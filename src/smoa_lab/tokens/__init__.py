"""A user's own rows as tokens: chat templates, what is trained, and the rows on disk."""
