"""Compares a model on a cut cache with itself on the full cache, on any prompts."""
