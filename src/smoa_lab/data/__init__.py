"""Rows: from a file or the Hub to tokens, and how answers to them are scored."""
