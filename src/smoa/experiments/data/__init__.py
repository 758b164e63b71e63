"""Real question sets as one record type; :func:`smoa.experiments.data.tasks.load_task` is the way in."""
