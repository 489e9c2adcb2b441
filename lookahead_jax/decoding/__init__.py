"""Turns a cache into tokens: draft, verify, accept and compact, one step at a time."""
