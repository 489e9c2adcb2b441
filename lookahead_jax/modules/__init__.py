"""Lookahead modules: the learned tokens, the LoRA that acts on them, and their files."""
