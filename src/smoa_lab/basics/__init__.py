"""Small helpers of the whole lab: cache folder, config sections, names of missing packages."""
