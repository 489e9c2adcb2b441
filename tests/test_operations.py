"""What operators see of a server: request ids, log lines and metrics."""

import contextlib
import json
import logging
import re
from socket import SHUT_RDWR

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lookahead_jax.engine.engine import Engine
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.server import request_log
from tests.serving import NAME, Gate, chat_model, running, until

NEW, PROMPT, BUDGET, KEY = 24, 40, 12, "sesame"
SECRET = "secret"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return chat_model(tmp_path_factory.mktemp("model"), template)


@pytest.fixture(scope="module")
def server(model):
    engine = Engine(
        model, policy=SnapKV(window=4, pool="avg", kernel=3), budget=BUDGET, rows=2,
        max_new_tokens=NEW, max_prompt_tokens=PROMPT, burst=4, drafter="prompt_lookup",
        draft_nodes=8,
    )  # fmt: skip
    with running(model, engine, keys=[KEY]) as server:
        yield server


@pytest.fixture
def lines(caplog):
    """A function that returns the log's lines so far, as objects, once there are `count`."""
    caplog.set_level(logging.INFO, logger=request_log.__name__)

    def read(count):
        def texts():
            return [r.getMessage() for r in caplog.records if r.name == request_log.__name__]

        until(lambda: len(texts()) >= count)
        assert len(texts()) == count
        assert not any(hidden in text for text in texts() for hidden in (SECRET, KEY))
        return [json.loads(text) for text in texts()]

    return read


def fields(**changes):
    return {"model": NAME, "prompt": f"a {SECRET}", "max_tokens": 5, **changes}


def post(server, body, path="/v1/completions", **headers):
    """Status, headers and content of an answer."""
    with contextlib.closing(server.connect()) as connection:
        given = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", **headers}
        connection.request("POST", path, json.dumps(body), given)
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()


def test_a_request_has_one_line_and_its_id(server, lines):
    sent = {"X-Request-Id": "trace-1/a"}
    answers = [
        post(server, fields(), **sent),
        post(server, fields(n=2, stream=True)),
        post(server, {"model": NAME, "prompt": SECRET}, "/tokenize"),
    ]
    whole, streamed, tokenized = lines(3)
    assert [headers["X-Request-Id"] for _, headers, _ in answers] == [
        line["request_id"] for line in (whole, streamed, tokenized)
    ]
    assert whole["request_id"] == "trace-1/a"
    assert re.fullmatch("[0-9a-f]{32}", streamed["request_id"])
    assert (whole["path"], whole["status"]) == ("/v1/completions", 200)
    prompt = len(fields()["prompt"])
    assert (whole["prompt_tokens"], whole["new_tokens"], whole["finish"]) == (prompt, 5, ["length"])
    assert (streamed["prompt_tokens"], streamed["new_tokens"]) == (prompt, 10)
    assert streamed["finish"] == ["length"] * 2
    for line in (whole, streamed):
        assert 0 <= line["queue_s"] <= line["first_token_s"] <= line["total_s"] < 60
    assert set(tokenized) == {"time", "request_id", "key", "path", "status", "total_s"}
    assert tokenized["key"] == 1  # its number, not the key


def test_openais_client_knows_the_id(server, lines):
    completions = server.client(KEY).completions
    given = dict(model=NAME, prompt="a", max_tokens=1)
    assert completions.create(**given, extra_headers={"X-Request-Id": "b"})._request_id == "b"
    assert lines(1)[0]["request_id"] == "b"


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "tab\there", "\u00e9"])
def test_an_id_that_is_not_short_and_printable_is_replaced(server, lines, given):
    sent = {"X-Request-Id": given.encode("latin-1")}
    made = post(server, {}, **sent)[1].get_all("X-Request-Id")
    assert len(made) == 1
    assert re.fullmatch("[0-9a-f]{32}", made[0])
    assert lines(1)[0]["request_id"] == made[0]


def test_errors_are_logged_by_code_and_nothing_is_repeated(server, lines):
    cases = [
        (fields(model=SECRET), "/v1/completions", 404, "model_not_found"),
        (fields(**{SECRET: 1}), "/v1/completions", 400, "unknown_field"),
        (fields(prompt=SECRET * 50), "/v1/completions", 400, "context_length_exceeded"),
        ({"model": SECRET, "prompt": "a"}, "/tokenize", 404, "model_not_found"),
        ({}, f"/{SECRET}?{SECRET}", 404, None),
        ({}, f"/v1/models/{SECRET}", 405, None),
    ]
    for body, path, status, _ in cases:
        found, headers, _ = post(server, body, path)
        assert found == status
        assert headers["X-Request-Id"]
    assert post(server, fields(), Authorization=f"Bearer {SECRET}")[0] == 401
    found = [(line["path"], line["status"], line.get("error")) for line in lines(len(cases) + 1)]
    known = ("/v1/completions", "/tokenize")
    assert found == [
        (path if path in known else "other", status, error) for _, path, status, error in cases
    ] + [("/v1/completions", 401, "invalid_api_key")]


def test_probes_that_succeed_are_not_logged(server, lines):
    for path in ("/health", "/ready", "/metrics"):
        assert server.send("GET", path, Authorization=f"Bearer {KEY}")[0] == 200
    assert server.send("GET", "/metrics")[0] == 401
    (line,) = lines(1)
    assert (line["path"], line["status"]) == ("/metrics", 401)


def test_a_client_that_leaves_is_logged(server, lines, monkeypatch):
    with Gate.before(server.engine, monkeypatch) as gate:
        connection = server.connect()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        body = json.dumps(fields(max_tokens=NEW, stream=True, temperature=1))
        connection.request("POST", "/v1/completions", body, headers)
        gate.allow_until_a_row_runs()
        assert connection.getresponse().readline().startswith(b"data: ")
        connection.sock.shutdown(SHUT_RDWR)
        (line,) = lines(1)
    assert (line["status"], line["error"]) == (200, "client_left")
    assert 0 < line["new_tokens"] < NEW
    assert "finish" not in line


def samples(server):
    text = server.send("GET", "/metrics", Authorization=f"Bearer {KEY}")[1]
    families = text_string_to_metric_families(text)
    return {(s.name, *s.labels.values()): s.value for f in families for s in f.samples}


def test_gaps_acceptance_eviction_and_cache_are_measured(server):
    before = samples(server)
    prompt = "one two one two one two one two"
    sent = fields(prompt=prompt, max_tokens=NEW)
    usage = json.loads(post(server, sent)[2])["usage"]
    steps = usage["lookahead"]["steps"]
    assert 0 < steps <= NEW - 1
    after = samples(server)

    def gain(name, now, then, *labels):
        return now[f"lookahead_{name}", *labels] - then[f"lookahead_{name}", *labels]

    assert gain("tokens_per_step_count", after, before) == 1
    assert gain("tokens_per_step_sum", after, before) == pytest.approx((NEW - 1) / steps)
    assert gain("evicted_share_count", after, before) == 1
    share = 1 - BUDGET / len(prompt)
    assert gain("evicted_share_sum", after, before) == pytest.approx(share)
    assert gain("evicted_share_bucket", after, before, "0.5") == (share <= 0.5)
    assert gain("evicted_share_bucket", after, before, "0.75") == (share <= 0.75)
    assert gain("stream_gap_seconds_count", after, before) == 0
    streamed = post(server, {**sent, "stream": True, "n": 2})[2]
    pieces = [json.loads(p[6:]) for p in streamed.split("\n\n") if p.startswith("data: {")]
    texts = [choice["text"] for piece in pieces for choice in piece["choices"] if choice["text"]]
    then = samples(server)
    assert gain("stream_gap_seconds_count", then, after) == len(texts) - 2  # between, per choice
    assert gain("stream_gap_seconds_sum", then, after) > 0
    assert after["lookahead_cache_bytes",] == server.engine._batch._state.cache.bytes > 0


def test_the_log_goes_to_stderr_as_it_is(monkeypatch, capsys):
    logger = logging.getLogger(request_log.__name__)
    for name, value in dict(handlers=[], propagate=True, level=logging.NOTSET).items():
        monkeypatch.setattr(logger, name, value)
    logger.manager._clear_cache()
    request_log.log_requests()
    request_log.RequestRecord("abc").log("/v1/models", 200)
    logger.manager._clear_cache()
    line = json.loads(capsys.readouterr().err)
    assert (line["request_id"], line["path"], line["status"]) == ("abc", "/v1/models", 200)
