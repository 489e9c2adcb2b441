"""Tasks written for the embedded model."""
