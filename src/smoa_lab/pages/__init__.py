"""What people read: cards, tables, charts and pictures."""
