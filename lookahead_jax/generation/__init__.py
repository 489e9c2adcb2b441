"""Turns prompts into text: input checks, generate and score, streamed output."""
