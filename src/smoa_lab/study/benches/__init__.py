"""Kinds of studies: what an entry is trained on and how it is scored."""
