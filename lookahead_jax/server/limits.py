"""Limits of the HTTP server; those on tokens are the engine's."""

import math
from dataclasses import dataclass
from typing import Annotated

import tyro

_OrNone = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
_MAY_BE_ZERO = ("max_queue", "max_queue_per_client", "shutdown_seconds")


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    max_body_bytes: int = 4 * 2**20
    """Largest body of a request, in bytes; a larger one gets status 413."""
    max_queue: int = 64
    """Continuations that may wait for a row; a request that would add more gets status 429."""
    max_queue_per_client: _OrNone = None
    """Of these, how many one client may have while it holds all rows (status 429). A client is its
    key or, on a server without keys, its address. Default: half of --max-queue if there are
    several keys, otherwise no limit of its own."""
    max_connections: int = 512
    """Most open connections; a further one gets status 503. Lowered to fit the limit on open files
    of the process."""
    max_connections_per_client: _OrNone = None
    """Most open connections from one address; a further one gets status 429. All clients behind a
    proxy have its address. Default: no limit of its own."""
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
            if value is None:
                continue
            least = 0 if name in _MAY_BE_ZERO else 1
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
            if value == math.inf:  # no timer takes it
                raise ValueError(f"{name} must be finite, not {value}")
        for most in ("max_queue", "max_connections"):
            share, all_ = getattr(self, f"{most}_per_client"), getattr(self, most)
            if share is not None and share > all_:
                raise ValueError(
                    f"{most}_per_client must be at most {most} = {all_}, not {share}: lower it, or "
                    f"raise {most}"
                )

    def client_queue(self, keys: int) -> int:
        """What `max_queue_per_client` is on a server with this many keys."""
        if self.max_queue_per_client is not None:
            return self.max_queue_per_client
        # One key has one user; without a key, one address may be a proxy with many users.
        return self.max_queue // 2 if keys > 1 else self.max_queue
