"""A study's results as rows, table, pictures and page."""
