"""Compares policies at many budgets on the same prompts, baselines tuned on a validation split."""
