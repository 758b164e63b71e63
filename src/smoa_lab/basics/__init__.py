"""Small helpers of the whole lab: files and folders, plain values, config sections, what may run."""
