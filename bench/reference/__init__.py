"""Comparison of our models with other implementations: the tables of docs/reference-models.md. It is not in the wheel."""
