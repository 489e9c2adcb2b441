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
    """Open connections, fewer where the process may not open as many files; beyond, one gets
    status 503 and is closed."""
    idle_seconds: float = 30.0
    """A connection is closed when its client takes longer than this to send the head of a request,
    or stops reading an answer for as long."""
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
