"""Connects the library to EleutherAI's lm-evaluation-harness."""
