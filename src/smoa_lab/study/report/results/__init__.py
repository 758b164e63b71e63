"""What the stored runs of a study show, in numbers: rows of tables, differences with intervals, headroom."""
