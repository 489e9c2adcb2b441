"""Benchmark tasks: prompts, expected answers and the scorer of each."""
