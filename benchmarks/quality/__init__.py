"""How good a model gets, on tasks that others report: one command per task, results as JSON."""
