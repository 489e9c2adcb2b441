"""Builds the small embedded model: corpus, mixture of tasks, training and packaging."""
