"""A study's results as rows, tables, pictures and page."""
