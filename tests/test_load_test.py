"""benchmarks/load_test.py: what its clients send, what counts as an answer, and what it checks."""

import asyncio
import json
import random
import re

import load_client
import load_exchanges
import pytest
from load_client import Answer, Outcome, converse
from load_exchanges import KINDS, Exchange, plan
from load_figures import checks, figures, ratios

from lookahead_jax.engine.engine import Engine
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.server import wire
from tests.serving import NAME, chat_model, running, until

TEXT = "abcdefgh " * 20
UNDER_LOAD = "resident memory under load"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def short(monkeypatch):
    """Prompts and answers for a tiny server."""
    for name, value in {"SHORT": (4, 20), "LONG": (20, 30), "NEW_TOKENS": (1, 8)}.items():
        monkeypatch.setattr(load_exchanges, name, value)
    monkeypatch.setattr(load_client, "LEAVE_AFTER_S", 0.05)
    monkeypatch.setattr(load_client, "SLOW_BYTES", 256)


def planned(count, **options):
    dice = random.Random(0)
    given = {"text": TEXT, "model": NAME, "well_behaved": False} | options
    return [plan(dice, **given) for _ in range(count)]


def test_a_server_answers_every_kind_as_expected(short, monkeypatch, tmp_path):
    by_kind = {each.kind: each for each in planned(1000) if b"response_format" not in each.sent}
    assert set(by_kind) == set(KINDS)
    monkeypatch.setattr(wire, "_BODY_SECONDS", 0.2)
    monkeypatch.setattr(wire, "_LAST_SECONDS", 0.2)
    model = chat_model(tmp_path, TEMPLATE)
    engine = Engine(
        model, policy=SnapKV(window=4, pool="avg", kernel=3), budget=16, rows=4, max_new_tokens=8,
        max_prompt_tokens=32, burst=4,
    )  # fmt: skip
    with running(model, engine, idle_seconds=1.0) as server:

        async def all_at_once():
            asked = [converse(server.port, each, patience=120) for each in by_kind.values()]
            return await asyncio.gather(*asked)

        outcomes = {each.kind: each for each in asyncio.run(all_at_once())}
        until(lambda: server.service.taken == 0)
    assert [each for each in outcomes.values() if each.problem] == []
    for kind, outcome in outcomes.items():
        if kind in ("whole", "stream", "slow"):
            assert (outcome.end, outcome.tokens > 0) == ("answered", True)
        elif kind == "leaves":
            assert outcome.end == "left"
        elif kind == "half_head":
            assert outcome.end == "closed"
        else:
            assert by_kind[kind].statuses - load_exchanges.REFUSED == {outcome.status}


def test_the_seed_decides_what_is_sent(short):
    assert planned(50) == planned(50)
    for each in planned(50, well_behaved=True):
        body = json.loads(each.sent.partition(b"\r\n\r\n")[2])
        assert each.sent.startswith(b"POST /v1/chat/completions ")
        assert (body["stream"], body["temperature"]) == (True, 0)
        assert each.leaves_after is None


HEAD = "HTTP/1.1 {} X\r\nContent-Type: {}\r\nContent-Length: {}\r\n\r\n{}"


def http(content, status=200, kind="text/event-stream"):
    return HEAD.format(status, kind, len(content), content).encode()


def events(*each, line="\n"):
    texts = [one if isinstance(one, str) else json.dumps(one) for one in each]
    return http("".join(f"data: {text}{line}{line}" for text in texts))


def judged(content, *, closed=True, size=10**6, **options):
    """The parsed answer that came in pieces of `size` bytes, and what is wrong with it."""
    answer = Answer(Exchange(**{"kind": "stream", "sent": b"", "stream": True} | options))
    for begin in range(0, len(content), size):
        answer.feed(content[begin : begin + size])
    if closed and not answer.complete:
        answer.feed(b"")
    return answer, answer.problem()


PIECE = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}
LAST = {
    "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
    "usage": {"completion_tokens": 5},
}
ERROR = {"error": {"message": "no room"}}
STREAM = events(PIECE, PIECE, LAST, "[DONE]")


@pytest.mark.parametrize("size", [1, 7, 10**6])
@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_a_stream_is_parsed_however_it_arrives(size, line):
    answer, problem = judged(events(PIECE, PIECE, LAST, "[DONE]", line=line), size=size)
    assert (problem, len(answer.pieces), answer.tokens) == (None, 2, 5)
    assert answer.complete


@pytest.mark.parametrize(
    ("content", "options", "problem"),
    [
        (b"", {}, "without an answer"),
        (b"", {"closes": True}, None),
        (STREAM[:-9], {}, "cut"),
        (b"nonsense\r\n\r\n", {}, "without an answer"),
        (events(PIECE, LAST), {}, r"\[DONE\]"),
        (events(PIECE, LAST), {"needs_done": False}, None),
        (events(PIECE, "[DONE]"), {}, "finish_reason"),
        (events(PIECE, "{"), {}, "no JSON"),
        (events(PIECE, ERROR), {}, None),
        (http(json.dumps(ERROR), 429, "application/json"), {}, None),
        (http(json.dumps(ERROR), 500, "application/json"), {}, "status 500"),
        (http("too busy", 503, "text/plain"), {}, "no JSON"),
        (http("{}", 503, "application/json"), {}, "without a message"),
        (http("Invalid", 400), {"statuses": frozenset({400}), "json_error": False}, None),
    ],
)  # fmt: skip
def test_what_is_no_right_answer_is_named(content, options, problem):
    _, found = judged(content, **options)
    assert found is None if problem is None else re.search(problem, found or "")


def test_an_answer_that_never_ends_fails(short):
    async def silent(reader, writer):
        await reader.read()

    async def ask():
        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await converse(port, planned(1, well_behaved=True)[0], patience=0.1)

    outcome = asyncio.run(ask())
    assert outcome.end == "failed"
    assert "0.1 s" in (outcome.problem or "")


def answered(began, pieces, tokens):
    return Outcome(
        kind="stream", began=began, ended=pieces[-1], status=200, tokens=tokens, pieces=pieces
    )


def test_figures_count_what_arrives_in_time():
    late = answered(18.0, [19.0, 21.0], 10)  # half of its tokens after the end
    refused = Outcome(kind="stream", began=11.0, ended=11.5, status=429)
    made = figures([answered(10.0, [11.0, 12.0, 14.0], 5), late, refused], began=10.0, seconds=10)
    assert made["answers_per_s"] == pytest.approx(0.1)
    assert made["tokens_per_s"] == pytest.approx((5 + 5) / 10)
    assert made["first_token_s"]["most"] == pytest.approx(1.0)
    assert made["gap_s"] == pytest.approx({"p50": 2.0, "p95": 2.0, "p99": 2.0, "most": 2.0})
    assert made["token_s"]["p50"] == pytest.approx(3 / 4)
    assert made["counts"] == {"stream": {"answered": 2, "refused 429": 1}}


def test_ratios_above_one_are_in_favour_of_the_first():
    slow, fast = (
        figures([answered(0.0, [step, 2 * step], 2)], began=0.0, seconds=10) for step in (4.0, 1.0)
    )
    found = ratios([fast, fast], [slow, fast])
    assert found["first_token_s p50"] == {"median": 2.5, "least": 1.0, "most": 4.0}
    assert found["tokens_per_s"]["median"] == 1.0
    nothing = figures([], began=0.0, seconds=10)
    assert ratios([fast, fast], [slow, nothing]) == {}


HELD = {
    "resident_mb": 1000.0,
    "threads": 20,
    "descriptors": 9,
    "running": 0.0,
    "waiting": 0.0,
    "places": 0.0,
}


@pytest.mark.parametrize(
    ("changed", "failing"),
    [
        ({}, None),
        ({"after": HELD | {"threads": 19}}, None),
        ({"after": HELD | {"threads": 21}}, "threads"),
        ({"after": HELD | {"descriptors": 10}}, "descriptors"),
        ({"after": HELD | {"running": 1.0}}, "rows in use afterwards"),
        ({"after": HELD | {"waiting": 1.0}}, "requests in the queue afterwards"),
        ({"after": HELD | {"places": 1.0}}, "places taken afterwards"),
        ({"answers": 0}, "answers"),
        ({"after": HELD | {"resident_mb": 900.0}}, None),
        ({"after": HELD | {"resident_mb": 1021.0}}, "resident memory without clients"),
        ({"samples": [{"resident_mb": 1000 + 3 * i} for i in range(10)]}, None),
        ({"samples": [{"resident_mb": 1000 + 4 * i} for i in range(10)]}, UNDER_LOAD),
        ({"samples": [{"resident_mb": 1000 - 4 * i} for i in range(10)]}, UNDER_LOAD),
        ({"problems": 1}, "exchanges without a right answer"),
        ({"marks": 1}, "errors in the log"),
        ({"status": -9}, "exit status"),
    ],
)
def test_checks_find_what_is_left_behind(changed, failing):
    given = {
        "before": HELD, "after": HELD, "samples": [{"resident_mb": 1000.0}] * 10, "problems": 0,
        "marks": 0, "status": 0, "answers": 5,
    }  # fmt: skip
    found = checks(**{**given, **changed})
    assert [name for name, check in found.items() if not check["ok"]] == (
        [] if failing is None else [failing]
    )
