"""Several short prompts in one reading: each request gets what it gets alone."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.checkpoints.load import load
from lookahead_jax.decoding.host_drafter import Draft
from lookahead_jax.engine.engine import Engine
from lookahead_jax.engine.requests import Request
from lookahead_jax.generation.generate import generate
from lookahead_jax.modules.definition import LookaheadConfig, init_modules
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.prefilling import pieces
from tests import tiny
from tests.compilations import compilations

CHECKPOINT = Path(__file__).parent / "fixtures" / "models" / "llama3"
BUDGET, NEW, ROWS = 12, 6, 5
LENGTHS = (30, 9, 17, 5, 25, 31)
PROMPTS = tiny.prompts(LENGTHS, vocab=320)
PINS = [[(0, 2)], [], [(3, 6), (9, 10)], [], [], [(30, 31)]]


@pytest.fixture(scope="module")
def model():
    return load(CHECKPOINT, dtype=jnp.float32)


def a_policy(name):
    return make_policy(name, **({"window": 4} if name in ("snapkv", "h2o") else {}))


def make_engine(model, policy="snapkv", **options):
    return Engine(
        model, policy=a_policy(policy), budget=BUDGET, rows=ROWS, max_new_tokens=NEW,
        max_prompt_tokens=32, eos_ids=(), max_stall_s=1e6, prompt_store_bytes=2**20, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(model):
    engine = make_engine(model)
    engine.warm_up()
    return engine


@pytest.fixture(autouse=True)
def nothing_stored(engine):
    engine._store.clear()


@pytest.fixture
def readings(engine, monkeypatch):
    """How many prompts each reading had."""
    numbers, read = [], engine._reader.read

    def noted(requests):
        numbers.append(len(requests))
        return read(requests)

    monkeypatch.setattr(engine._reader, "read", noted)
    return numbers


def request(i, **options):
    return Request(**{"prompt": PROMPTS[i], "max_new_tokens": NEW, "pin": PINS[i], **options})


def alone(model, i, policy="snapkv", **options):
    return generate(
        model, [PROMPTS[i]], policy=a_policy(policy), budget=BUDGET, max_new_tokens=NEW,
        eos_ids=(), pin=[PINS[i]], **options,
    ).tokens[0]  # fmt: skip


@pytest.fixture(scope="module")
def expected(model):
    return [alone(model, i) for i in range(len(PROMPTS))]


def results(events):
    return {event.id: event.result for event in events if event.result is not None}


def drain(engine):
    events = []
    while engine.alive:
        events += engine.step()
    return results(events)


def test_up_to_four_prompts_of_any_short_length_are_one_reading(engine, expected, readings):
    before = len(compilations)
    ended = engine.run([request(i) for i in range(5)])
    assert readings == [4, 1]
    assert [result.tokens for result in ended] == expected[:5]
    # The cache of a row has its own prompt's entries: short prompts are kept whole.
    assert [result.kept_entries for result in ended] == [12, 9, 12, 5, 12]
    assert engine.prompt_store.misses == 5
    again = engine.run([request(3), request(0), request(5), request(1)])
    assert readings == [4, 1, 1, 1, 1, 1]  # what is stored is not read again
    assert [result.reused_tokens for result in again] == [5, 30, 0, 9]
    assert [result.tokens for result in again] == [expected[i] for i in (3, 0, 5, 1)]
    assert len(compilations) == before


def test_three_fill_a_reading_and_two_are_read_one_by_one(engine, expected, readings):
    assert [result.tokens for result in engine.run([request(i) for i in (5, 3, 2)])] == [
        expected[i] for i in (5, 3, 2)
    ]
    engine.run([request(0), request(1)])
    assert readings == [3, 1, 1]


def test_equal_prompts_are_read_once(engine, expected, readings):
    same = engine.run([request(0), request(0), request(0), request(0)])
    assert [result.tokens for result in same] == [expected[0]] * 4
    assert [result.reused_tokens for result in same] == [0, 30, 30, 30]
    # Another tenant, or another pin, makes a prompt another one.
    engine._store.clear()
    others = [request(0), request(0, tenant="b"), request(0, pin=[(1, 2)])]
    assert [result.reused_tokens for result in engine.run(others)] == [0, 0, 0]
    assert readings == [1, 1, 1, 1, 3]


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("lookaheadkv", {}),
        ("h2o", {"evict_every": 4}),  # scores that add up while decoding
        ("full", {"cache_dtype": "int8"}),
    ],
)
def test_policies_keep_of_each_prompt_what_they_keep_alone(model, policy, options):
    if policy == "lookaheadkv":
        sizes = LookaheadConfig(tokens=4, rank=2, alpha=4.0, targets=("q",), init="normal")
        modules = init_modules(jax.random.key(0), sizes, model.config)
        options = {**options, "lookahead": modules}
    engine = make_engine(model, policy, **options)
    ended = engine.run([request(i) for i in (0, 1, 2, 5)])
    assert [result.tokens for result in ended] == [
        alone(model, i, policy, **options) for i in (0, 1, 2, 5)
    ]


@pytest.mark.parametrize("why", ["cancelled", "error"])
def test_some_or_all_may_end_while_they_are_read(engine, expected, monkeypatch, why):
    monkeypatch.setattr(engine, "_max_stall_s", 1e-9)
    ids = [engine.submit(request(i)) for i in (0, 1, 2)]
    engine.step()
    assert engine.waiting == 0
    if why == "cancelled":
        engine.cancel(ids[1])
    else:
        monkeypatch.setattr(pieces, "_close", None)
    events = engine.step()
    while ids[1] not in results(events):
        events += engine.step()
    monkeypatch.undo()
    ended = results(events) | drain(engine)
    if why == "cancelled":
        assert [ended[id].tokens for id in ids] == [expected[0], [], expected[2]]
    assert ended[ids[1]].finish == why
    assert ended[ids[0]].finish == ("error" if why == "error" else "length")
    # Without any of its requests a reading ends at once.
    monkeypatch.setattr(engine, "_max_stall_s", 1e-9)
    ids = [engine.submit(request(i)) for i in (3, 4, 5)]
    engine.step()
    for id in ids:
        engine.cancel(id)
    assert set(results(engine.step())) == set(ids)
    assert engine._opening is None
    assert engine._rows == [None] * ROWS


class Choosy:
    """A host drafter that has no room for prompts of nine tokens."""

    def __init__(self):
        self.open = set()
        self.failure: BaseException = RuntimeError("no room")

    def begin(self, request, prompt):
        if len(prompt) == 9:
            raise self.failure
        self.open.add(request)

    def observe(self, request, tokens):
        assert request in self.open

    def propose(self, request, nodes, depth):
        return Draft(np.zeros(0, np.int32), np.zeros(0, np.int32))

    def end(self, request):
        self.open.remove(request)


def test_a_drafter_that_fails_ends_one_request_and_an_interrupt_all(model, expected):
    drafter = Choosy()
    engine = make_engine(model, drafter=drafter, draft_nodes=8)
    first, failed, third = engine.run([request(i) for i in (0, 1, 2)])
    assert [first.tokens, third.tokens] == [expected[0], expected[2]]
    assert failed.error == "RuntimeError: no room"
    engine._store.clear()
    drafter.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.run([request(i) for i in (0, 1, 2)])
    assert engine.alive == 0
    assert drafter.open == set()
    assert engine.run([request(2)])[0].tokens == expected[2]
