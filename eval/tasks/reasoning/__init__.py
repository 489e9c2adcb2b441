"""Short problems whose answers are checked exactly, without a judge."""
