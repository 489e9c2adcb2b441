"""Tasks about contexts that are shared, recited or obeyed, generated without data sets."""
