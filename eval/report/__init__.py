"""Turns the rows of a run into one HTML page with charts and intervals."""
