"""What people read: HTML and Markdown from templates, tables, charts and pictures."""
