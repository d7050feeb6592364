"""Evaluation through lm-eval: an adapter (`lm`), and tasks of our own as YAML."""
