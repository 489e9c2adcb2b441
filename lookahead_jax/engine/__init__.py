"""Continuous batching: requests wait in a queue and share a batch of fixed size."""
