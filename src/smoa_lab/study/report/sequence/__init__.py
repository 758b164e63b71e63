"""The report of a study of kind `sequence`: what was forgotten of the first task at equal learning of the last one."""
