"""Recipes: short programs over the same stages, chosen by name."""
