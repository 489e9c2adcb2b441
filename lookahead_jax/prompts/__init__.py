"""Reads prompts that need more than one pass: a response, a draft, a replay or a small model."""
