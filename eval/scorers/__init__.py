"""Scores an answer against what is expected, as each benchmark defines it."""
