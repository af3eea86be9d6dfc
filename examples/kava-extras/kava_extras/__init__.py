"""Policies and a source for KaVa, found by their entry points in pyproject.toml."""
