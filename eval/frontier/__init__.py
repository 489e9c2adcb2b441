"""Policies and types of cache compared at equal bytes: what a given memory buys."""
