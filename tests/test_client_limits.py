"""Limits per client: one that fills its share is refused, and others are served."""

import contextlib
import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from lookahead_jax.checkpoints.load import load
from lookahead_jax.engine.engine import Engine
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.server.clients import client_address
from lookahead_jax.server.limits import ServerLimits
from tests import tiny
from tests.serving import NAME, Gate, running, until

ROWS, NEW = 2, 8
HERE, THERE = "127.0.0.1", "127.0.0.2"
KEYS = ["sesame", "tahini"]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is an address on Linux")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save_bytes_model(folder, num_hidden_layers=1)
    return load(folder)


@pytest.fixture(scope="module")
def engine(model):
    return Engine(
        model, policy=SnapKV(window=4, pool="avg", kernel=3), budget=16, rows=ROWS,
        max_new_tokens=NEW, max_prompt_tokens=32, burst=4,
    )  # fmt: skip


@pytest.fixture
def gate(engine, monkeypatch):
    with Gate.before(engine, monkeypatch) as gate:
        yield gate


def fields(**changes):
    return {"model": NAME, "prompt": "abc", "max_tokens": 2, **changes}


def ask(server, source=HERE, **changes):
    return server.send("POST", "/v1/completions", fields(**changes), source)


# Places in the queue


@LINUX
def test_one_address_fills_its_share_and_another_is_served(model, engine, gate):
    with (
        running(model, engine, max_queue=4, max_queue_per_client=1) as server,
        ThreadPoolExecutor(5) as pool,
    ):
        own = [pool.submit(ask, server) for _ in range(ROWS + 1)]
        until(lambda: server.service.taken == ROWS + 1)
        status, content = ask(server)
        assert (status, content["error"]["code"]) == (429, "client_queue_full")
        assert "one client may have 3 continuations that run or wait" in content["error"]["message"]
        assert "max_queue_per_client" in content["error"]["message"]
        connection = server.connect()
        named = {"Content-Type": "application/json", "X-Forwarded-For": "10.1.2.3"}
        connection.request("POST", "/v1/completions", json.dumps(fields()), named)
        response = connection.getresponse()  # a header makes nobody another client
        assert (response.status, response.headers["Retry-After"]) == (429, "1")
        connection.close()
        other = pool.submit(ask, server, THERE, n=2)
        until(lambda: server.service.taken == ROWS + 3)
        assert server.send("GET", "/ready")[0] == 200
        status, content = ask(server, THERE, n=2)  # one place is left to it, and one to all
        assert (status, content["error"]["code"]) == (429, "queue_full")
        gate.open()
        assert [answer.result(30)[0] for answer in (*own, other)] == [200] * 4
        until(lambda: server.service.taken == 0)
        assert not server.service._taken
        assert ask(server)[0] == 200


def test_a_client_is_its_key_and_two_keys_never_fill_the_queue_alone(model, engine, gate):
    with (
        running(model, engine, keys=KEYS, max_queue=4) as server,  # half of it per key
        ThreadPoolExecutor(5) as pool,
    ):
        first, second = (server.client(key).completions.create for key in KEYS)
        own = [pool.submit(first, **fields()) for _ in range(ROWS + 2)]
        until(lambda: server.service.taken == ROWS + 2)
        with pytest.raises(openai.RateLimitError) as caught:
            first(**fields())
        assert caught.value.code == "client_queue_full"
        other = pool.submit(second, **fields())
        until(lambda: server.service.taken == ROWS + 3)
        gate.open()
        assert {answer.result(30).usage.completion_tokens for answer in (*own, other)} == {2}


@pytest.mark.parametrize("keys", [0, 1])
def test_one_user_alone_may_fill_the_queue(keys, model, engine, gate):
    with (
        running(model, engine, keys=KEYS[:keys], max_queue=4) as server,
        ThreadPoolExecutor(6) as pool,
    ):
        create = server.client(KEYS[0]).completions.create
        own = [pool.submit(create, **fields()) for _ in range(ROWS + 4)]
        until(lambda: server.service.taken == ROWS + 4)
        with pytest.raises(openai.RateLimitError) as caught:
            create(**fields())
        assert caught.value.code == "queue_full"
        gate.open()
        assert {answer.result(30).usage.completion_tokens for answer in own} == {2}


def test_more_choices_than_a_client_may_have_cannot_wait(model, engine):
    with running(model, engine, max_queue=9, max_queue_per_client=0) as server:
        status, content = ask(server, n=ROWS + 1)
        assert status == 400
        assert content["error"]["message"] == (
            "3 continuations are more than the 2 one client may have: ask for fewer prompts or "
            "choices (n) at a time"
        )
        assert ask(server, n=ROWS)[0] == 200


def test_places_come_back_however_a_request_ends(model, engine, gate, monkeypatch):
    def fail(*_):
        raise RuntimeError("no idea")

    limits = dict(max_queue=4, max_queue_per_client=0, queue_seconds=1.0)
    with running(model, engine, **limits) as server:
        for _ in range(ROWS + 1):  # more than there are places
            assert ask(server, prompt="a" * 1000)[0] == 400
        with monkeypatch.context() as context:
            context.setattr(engine, "submit_all", fail)
            assert [ask(server)[0] for _ in range(ROWS + 1)] == [500] * (ROWS + 1)
        assert server.service.taken == 0
        assert ask(server, n=ROWS)[1]["error"]["code"] == "queue_timeout"
        assert ask(server)[1]["error"]["code"] == "client_queue_full"  # it has yet to leave
        gate.allow(1)
        until(lambda: server.service.taken == 0)
        leaving = server.connect()
        body = json.dumps(fields(n=ROWS))
        leaving.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        until(lambda: server.service.taken == ROWS)
        assert leaving.sock is not None
        leaving.sock.shutdown(socket.SHUT_RDWR)
        leaving.close()
        until(lambda: len(engine._queue._cancelled) == ROWS)
        gate.allow(1)
        until(lambda: server.service.taken == 0)
        gate.open()
        assert ask(server, n=ROWS)[0] == 200
        assert not server.service._taken


# Connections


def everything(connection):
    """What comes until the server closes the connection."""
    content = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            content += chunk
    return content.decode()


@LINUX
def test_connections_of_one_address_beyond_its_cap_are_refused(model, engine):
    def connect(source=HERE):
        address = ("127.0.0.1", server.port)
        return socket.create_connection(address, 30, source_address=(source, 0))

    with (
        running(model, engine, max_connections=4, max_connections_per_client=2) as server,
        contextlib.ExitStack() as open_,
    ):
        connections = server.server.server_state.connections
        first, _ = (open_.enter_context(connect()) for _ in range(2))
        until(lambda: len(connections) == 2)
        head, _, body = everything(open_.enter_context(connect())).partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 429 Too Many Requests\r\n")
        assert "\r\nretry-after: 1\r\n" in head
        error = json.loads(body)["error"]
        assert error["code"] == "client_connections_full"
        assert "max_connections_per_client" in error["message"]
        until(lambda: len(connections) == 2)
        assert server.send("GET", "/health", source=THERE)[0] == 200
        first.close()
        until(lambda: len(connections) == 1)
        assert server.send("GET", "/health")[0] == 200
        until(lambda: len(connections) == 1)
        for i in range(3):
            open_.enter_context(connect(f"127.0.0.{3 + i}"))
        until(lambda: len(connections) == 4)  # the cap of all
        assert everything(open_.enter_context(connect(THERE))).startswith("HTTP/1.1 503 ")
    assert not server.server.config.http_protocol_class.addresses  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        (("10.0.0.1", 5000), "10.0.0.1"),
        (("::ffff:10.0.0.1", 5000, 0, 0), "10.0.0.1"),
        (("2001:db8::1:2", 5000), "2001:db8::/64"),
        (("2001:db8::ff:3", 5001), "2001:db8::/64"),
        (("fe80::1%eth0", 5000), "fe80::/64"),
        (None, ""),
    ],
)
def test_a_client_is_an_address_or_a_network_of_64_bits(peer, address):
    assert client_address(peer) == address


def test_a_share_is_a_part_of_the_whole():
    assert [ServerLimits(max_queue=5).client_queue(keys) for keys in (0, 1, 2)] == [5, 5, 2]
    assert ServerLimits(max_queue=5, max_queue_per_client=0).client_queue(2) == 0
    with pytest.raises(ValueError, match="max_connections_per_client must be at most"):
        ServerLimits(max_connections=5, max_connections_per_client=6)
    with pytest.raises(ValueError, match="max_queue_per_client must be at least 0, not -1"):
        ServerLimits(max_queue_per_client=-1)
