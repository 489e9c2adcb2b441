"""Eviction policies: which prompt entries are kept. `make_policy` builds one from its name."""
