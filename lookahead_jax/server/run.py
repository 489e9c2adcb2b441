"""A socket, the event loop, and how both come to an end."""

import ipaddress
import socket
import sys
from types import FrameType

import uvicorn

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.host.warn import warn
from lookahead_jax.server.app import make_app
from lookahead_jax.server.service import Service

_LAST_SECONDS = 10  # after the time to finish: for the errors of those that did not


def bind(host: str, port: int, *, has_key: bool) -> socket.socket:
    """A socket that is bound, and listens once a server runs on it; port 0 takes a free one.

    Warns where others can come in without a key. Raises ValueError for a host or a port that
    cannot be, OSError for a port that is taken.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be 0 to 65535, not {port}")
    try:
        family, _, _, _, (address, *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ValueError(f"{host} is no address to listen at ({error.strerror})") from error
    if not (has_key or ipaddress.ip_address(str(address).partition("%")[0]).is_loopback):
        warn(f"listening at {host} without a key: whoever reaches it can use it (--api-key-file)")
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address, port))
    except OSError:
        bound.close()
        raise
    return bound


class Server(uvicorn.Server):
    """Answers every request before it ends.

    The first signal lets running requests finish, for as long as the limits say; the second fails
    them at once, each with an error of its own.
    """

    def __init__(self, service: Service, model: Model, *, name: str, api_key: str | None = None):
        self._service = service
        patience = service.limits.shutdown_seconds + _LAST_SECONDS
        super().__init__(
            uvicorn.Config(
                make_app(service, model, name=name, api_key=api_key),
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=round(patience),
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What a signal does; may be called from any thread."""
        seconds = 0.0 if self.should_exit else self._service.limits.shutdown_seconds
        self._service.drain(seconds)
        self.should_exit = True
        print(f"lookahead: finishing within {seconds:g} s", file=sys.stderr)
