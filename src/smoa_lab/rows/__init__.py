"""Rows of users' own data: files, formats, and what is wrong with a row."""
