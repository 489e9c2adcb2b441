"""Searches over continuations: rows that fork from a prompt, are steered, scored and resampled."""
