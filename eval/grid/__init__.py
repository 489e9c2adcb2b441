"""Runs a grid of models, policies, budgets, tasks and protocols, and stores one row per answer."""
