"""The listening socket, the event loop, and the end of both."""

import asyncio
import ipaddress
import math
import socket
import sys
from collections.abc import Sequence
from types import FrameType

import uvicorn

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.host.warn import warn
from lookahead_jax.server.app import make_app
from lookahead_jax.server.connections import BACKLOG, AcceptErrors, limited_protocol
from lookahead_jax.server.service import Service

_LAST_SECONDS = 10  # after the time to finish: for the errors of requests that did not


def bind(host: str, port: int, *, has_key: bool) -> socket.socket:
    """A bound socket for a server; port 0 takes a free one.

    Warns if other machines can use it without a key. Raises ValueError for an invalid host or
    port, OSError for a port in use.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be 0 to 65535, not {port}")
    try:
        family, _, _, _, (address, *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ValueError(f"cannot listen on {host} ({error.strerror})") from error
    if not (has_key or ipaddress.ip_address(str(address).partition("%")[0]).is_loopback):
        warn(
            f"listening on {host} without a key: anyone who reaches it can use it (--api-key-file)"
        )
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

    The first signal gives running requests `shutdown_seconds` to finish; the second ends them at
    once. Each that does not finish gets an error.
    """

    def __init__(
        self,
        service: Service,
        model: Model,
        *,
        name: str,
        api_keys: Sequence[str] = (),
        allow_special_tokens: bool = False,
        drafter: str = "none",
        with_page: bool = True,
    ):
        self._service = service
        patience = service.limits.shutdown_seconds + _LAST_SECONDS
        app = make_app(
            service, model, name=name, api_keys=api_keys, allow_special_tokens=allow_special_tokens,
            drafter=drafter, with_page=with_page,
        )  # fmt: skip
        super().__init__(
            uvicorn.Config(
                app,
                http=limited_protocol(service.limits),
                proxy_headers=False,  # any client could name another as its address
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                log_level="error",  # one line for every malformed request would fill the disk
                backlog=BACKLOG,
                timeout_keep_alive=math.ceil(service.limits.idle_seconds),
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=round(patience),
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        asyncio.get_running_loop().set_exception_handler(AcceptErrors())
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles a signal; may be called from any thread."""
        seconds = 0.0 if self.should_exit else self._service.limits.shutdown_seconds
        self._service.drain(seconds)
        self.should_exit = True
        print(f"lookahead: finishing within {seconds:g} s", file=sys.stderr)
