"""From data to a served model in stages: train, evaluate, compare, register, deploy."""
