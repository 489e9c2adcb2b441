"""Limits of the HTTP server; those on tokens are the engine's."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    max_body_bytes: int = 4 * 2**20
    """Largest body of a request, in bytes; a larger one gets status 413."""
    max_queue: int = 64
    """Continuations that may wait for a row; a request that would add more gets status 429."""
    max_connections: int = 512
    """Most open connections; a further one gets status 503. Lowered to fit the limit on open files
    of the process."""
    idle_seconds: float = 30.0
    """A connection is closed if its client sends no complete head of a request for this many
    seconds, or does not read its answer for as long."""
    queue_seconds: float = 60.0
    """A request that has no token after this many seconds gets status 503."""
    request_seconds: float = 600.0
    """A request that has not ended after this many seconds is ended with an error (503)."""
    shutdown_seconds: float = 30.0
    """Time for running requests to finish after Ctrl-C or SIGTERM; a second signal ends them."""

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 0 if name in ("max_queue", "shutdown_seconds") else 1
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
            if value == math.inf:  # no timer takes it
                raise ValueError(f"{name} must be finite, not {value}")
