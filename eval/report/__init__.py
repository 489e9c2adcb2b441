"""Turns the rows of runs into a page with charts, and into the table that is published."""
