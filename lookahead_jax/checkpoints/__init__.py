"""Reads and writes what is on disk: model weights, configurations, tokenizers and saved caches."""
