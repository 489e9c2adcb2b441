"""The commands of `lookahead`: each module is a dataclass of options and `main(config)`."""
