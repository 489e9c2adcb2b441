"""Helpers that every command shares on the host: files, configuration files, error messages."""
