"""Servers on loopback for the tests: a tiny model of bytes, each server in a thread of its own."""

import contextlib
import dataclasses
import http.client
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import openai

from lookahead_jax.checkpoints.load import Model, load
from lookahead_jax.engine.engine import Engine
from lookahead_jax.server.limits import ServerLimits
from lookahead_jax.server.run import Server, bind
from lookahead_jax.server.service import Service
from tests import tiny

NAME = "tiny"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """A server that answers."""

    port: int
    engine: Engine
    service: Service
    server: Server
    thread: threading.Thread

    def client(self, key: str = "none") -> openai.OpenAI:
        """OpenAI's own client, which tries nothing twice."""
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=url, api_key=key, max_retries=0)

    def connect(self, source: str = "127.0.0.1") -> http.client.HTTPConnection:
        """A client at the address `source`, which is any of 127.0.0.0/8 on Linux."""
        return http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=60, source_address=(source, 0)
        )

    def send(
        self, method: str, path: str, body: Any = None, source: str = "127.0.0.1", **headers: str
    ) -> tuple[int, Any]:
        """Status and content of one request; objects go out, and come back, as JSON."""
        with contextlib.closing(self.connect(source)) as connection:
            if not isinstance(body, bytes | None):
                body = json.dumps(body).encode()
            given = {"Content-Type": "application/json"} | {
                name.replace("_", "-"): value for name, value in headers.items()
            }
            connection.request(method, path, body, given)
            response = connection.getresponse()
            content = response.read()
            is_json = response.headers.get_content_type() == "application/json"
            return response.status, json.loads(content) if is_json else content.decode()

    def stop(self) -> None:
        """What Ctrl-C does."""
        self.server.handle_exit(signal.SIGINT, None)


@contextlib.contextmanager
def running(
    model: Model,
    engine: Engine,
    *,
    keys: Sequence[str] = (),
    allow_special_tokens: bool = False,
    drafter: str = "none",
    with_page: bool = True,
    **limits: float,
) -> Iterator[Running]:
    """Serves `engine` until the block ends; fails if the server does not end by itself."""
    service = Service(engine, ServerLimits(**limits), keys=len(keys))
    server = Server(
        service, model, name=NAME, api_keys=keys, allow_special_tokens=allow_special_tokens,
        drafter=drafter, with_page=with_page,
    )  # fmt: skip
    with bind("127.0.0.1", 0, has_key=True) as socket:
        thread = threading.Thread(target=lambda: server.run(sockets=[socket]), daemon=True)
        thread.start()
        until(lambda: server.started)
        port = socket.getsockname()[1]
        here = Running(port=port, engine=engine, service=service, server=server, thread=thread)
        try:
            yield here
        finally:
            for _ in range(2):  # the second time it gives up what still runs
                if thread.is_alive():
                    here.stop()
            thread.join(30)
            assert not thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    """Waits for what other threads bring about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def chat_model(folder, template):
    """A tiny model of bytes with a chat template."""
    tiny.save_bytes_model(folder, num_hidden_layers=1)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return load(folder)


class Gate:
    """Lets an engine make as many steps as it is told to, and no more."""

    def __init__(self, engine: Engine, monkeypatch):
        self._permits, self._made = threading.Semaphore(0), threading.Semaphore(0)
        self._open = False
        self._engine = engine
        step = engine.step

        def gated():
            if not self._open:
                self._permits.acquire()
            events = step()
            self._made.release()
            return events

        monkeypatch.setattr(engine, "step", gated)

    @classmethod
    @contextlib.contextmanager
    def before(cls, engine: Engine, monkeypatch) -> Iterator["Gate"]:
        """Closed within the block; afterwards what waited has gone through."""
        gate = cls(engine, monkeypatch)
        try:
            yield gate
        finally:
            gate.open()
        until(lambda: engine.alive == 0)

    def allow(self, steps: int) -> None:
        """Returns when they have been made."""
        self._permits.release(steps)
        for _ in range(steps):
            assert self._made.acquire(timeout=30)

    def allow_until_a_row_runs(self) -> None:
        """As many as it takes to read the prompt of a waiting request."""
        while not any(self._engine._rows):
            self.allow(1)

    def open(self) -> None:
        """From now on the engine is free."""
        self._open = True
        self._permits.release()
