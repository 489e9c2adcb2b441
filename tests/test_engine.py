"""Requests that come and go in a batch of three rows: each gets what it would get alone."""

import itertools
import threading
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.checkpoints.load import load
from lookahead_jax.decoding.drafted import Drafting
from lookahead_jax.decoding.host_drafter import Draft
from lookahead_jax.decoding.node_choice import Controller, Plan
from lookahead_jax.decoding.row_error import RowError
from lookahead_jax.decoding.sampling import (
    GREEDY,
    Sampling,
    TextSoFar,
    process_logits,
    sampling_rows,
)
from lookahead_jax.engine.engine import Engine
from lookahead_jax.engine.opening import Opening
from lookahead_jax.engine.queue import RequestQueue
from lookahead_jax.engine.requests import MAX_EOS_IDS, ActiveRequest, EncodedRequest, Request
from lookahead_jax.generation.generate import generate
from lookahead_jax.modules.definition import LookaheadConfig, init_modules
from lookahead_jax.policies.kvzip import KVzip
from lookahead_jax.policies.lookaheadkv import LookaheadKV
from lookahead_jax.policies.oracle import Oracle
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.prefilling import pieces
from tests import tiny
from tests.compilations import compilations

POLICY, BUDGET, NEW = SnapKV(window=4, pool="avg", kernel=3), 12, 16
CHECKPOINT = Path(__file__).parent / "fixtures" / "models" / "llama3"
FULL = Sampling(temperature=1.2, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
SETTINGS = [GREEDY, FULL, Sampling(temperature=1.5, top_p=0.9, repetition_penalty=0.9)]
PROMPTS = tiny.prompts((30, 9, 17, 16, 25, 5, 31, 12), vocab=320)
LIMITS = [16, 3, 16, 9, 1, 16, 12, 16]


@pytest.fixture(scope="module")
def model():
    return load(CHECKPOINT, dtype=jnp.float32)


def make_engine(model, **options):
    sizes = dict(policy=POLICY, budget=BUDGET, rows=3, max_new_tokens=NEW, max_prompt_tokens=32)
    # No stall is too long: prompts are read whole, whatever the machine does meanwhile.
    return Engine(model, **{**sizes, "burst": 4, "eos_ids": (), "max_stall_s": 1e6, **options})


@pytest.fixture(scope="module")
def engine(model):
    """One for many tests: what a request leaves behind must not show in the next."""
    engine = make_engine(model)
    engine.warm_up()
    return engine


def request(i, **options):
    prompt, sampling = PROMPTS[i % 8], SETTINGS[i % 3]
    given = dict(prompt=prompt, max_new_tokens=LIMITS[i % 8], sampling=sampling, seed=50 + i)
    return Request(**{**given, **options})


@pytest.fixture(scope="module")
def alone(model):
    """Tokens of each request with nobody beside it, to the full length."""
    return [
        generate(
            model, [PROMPTS[i]], policy=POLICY, budget=BUDGET, max_new_tokens=NEW, eos_ids=(),
            sampling=SETTINGS[i % 3], seeds=[50 + i],
        ).tokens[0]
        for i in range(8)
    ]  # fmt: skip


def drain(engine):
    events = []
    while engine.alive:
        events += engine.step()
    return events


def results(events):
    return {event.id: event.result for event in events if event.result is not None}


def as_alone(model, i, tokens, alone):
    """Whether request i got what it gets alone; if not, because of a near-tie."""
    decision = partial(
        tiny.decision, model.params, model.config, PROMPTS[i], policy=POLICY, budget=BUDGET,
        sampling=SETTINGS[i % 3], seed=50 + i, new_tokens=NEW,
    )  # fmt: skip
    return tiny.same_tokens(tokens, alone[i][: LIMITS[i]], decision)


DRAFTERS = [
    ("none", None),
    ("prompt_lookup", 8),
    ("recycling", 8),
    ("prompt_lookup+recycling", 16),
    ("trie", 8),
    ("suffix", 8),
    ("trie+suffix", Controller([1, 8])),
    ("early_exit", Controller([1, 8])),
]


@pytest.mark.parametrize(("drafter", "nodes"), DRAFTERS)
def test_rows_join_and_leave_without_compiling_and_get_what_they_get_alone(
    model, engine, alone, drafter, nodes, monkeypatch
):
    if isinstance(nodes, Controller):  # what pays is no matter here, so everything is tried
        plans = itertools.cycle((Plan(1, 4, 8), Plan(8, 4, 0), Plan(8, 4, 0), Plan(1, 4, 0)))

        def choose(burst, *, watchable, behind):
            plan = next(plans)
            return plan._replace(watch=0) if behind else plan

        monkeypatch.setattr(nodes, "choose", choose)
        monkeypatch.setattr(Controller, "affords_watching", True)
    if drafter != "none":
        engine = make_engine(model, drafter=drafter, draft_nodes=nodes)
    engine.warm_up()
    before = len(compilations)
    ids = [engine.submit(request(i)) for i in (0, 1, 2, 3, 4)]
    events = engine.step() + engine.step()
    ids += [engine.submit(request(i)) for i in (5, 6, 7)]
    events += drain(engine)
    assert len(compilations) == before
    ended = results(events)
    for i, id in enumerate(ids):
        same = as_alone(model, i, ended[id].tokens, alone)
        assert ended[id].text == model.tokenizer.decode(ended[id].tokens)
        assert ended[id].finish == "length"
        assert ended[id].prompt_tokens == len(PROMPTS[i])
        assert ended[id].kept_entries == min(len(PROMPTS[i]), BUDGET)
        mine = [event for event in events if event.id == id]
        assert [token for event in mine for token in event.tokens] == ended[id].tokens
        assert "".join(event.text for event in mine) == ended[id].text
        assert [event.result is not None for event in mine] == [False] * (len(mine) - 1) + [True]
        timing = ended[id].timing
        assert 0 <= timing.started_s <= timing.first_token_s <= timing.ended_s
        if drafter == "none" and same:
            assert ended[id].steps == LIMITS[i] - 1
    assert engine.waiting == 0


def test_a_controller_may_have_plain_decoding_alone(model, alone):
    engine = make_engine(model, drafter="trie", draft_nodes=Controller([1]))
    engine.warm_up()
    id = engine.submit(request(0))
    assert as_alone(model, 0, results(drain(engine))[id].tokens, alone)


def test_a_cancelled_request_ends_within_a_burst_and_frees_its_row(engine, alone):
    ids = [engine.submit(request(0, max_new_tokens=NEW)) for _ in range(4)]
    events = [event for _ in range(3) for event in engine.step()]
    assert {event.id for event in events} == set(ids[:3])
    assert engine.cancel(ids[1])
    assert engine.cancel(ids[3])
    events = engine.step()
    ended = results(events)
    assert ended[ids[1]].finish == ended[ids[3]].finish == "cancelled"
    assert ended[ids[1]].tokens == alone[0][: len(ended[ids[1]].tokens)] != []
    assert ended[ids[3]].tokens == []
    assert ended[ids[3]].timing.started_s is None
    assert ended[ids[3]].kept_entries is None
    assert not engine.cancel(ids[1])
    other = engine.submit(request(2))
    ended = results(drain(engine))
    assert ended[other].tokens == alone[2]
    assert ended[ids[0]].tokens == ended[ids[2]].tokens == alone[0]


class Diary:
    """What an engine did, in order: "read" a prompt, or decoded a "burst" of so many steps."""

    def __init__(self, engine, monkeypatch):
        self.entries = []
        read, advance = engine._reader.read, engine._batch.advance

        def noted_read(*arguments):
            self.entries.append("read")
            return read(*arguments)

        def noted_advance(steps):
            self.entries.append(steps)
            return advance(steps)

        monkeypatch.setattr(engine._reader, "read", noted_read)
        monkeypatch.setattr(engine._batch, "advance", noted_advance)


def test_requests_of_one_token_do_not_stop_a_running_one(engine, alone, monkeypatch):
    """Every answer brings the next such request, as clients that classify send them."""
    diary, pauses, answered = Diary(engine, monkeypatch), [], []
    monkeypatch.setattr(engine, "on_pause", pauses.append)

    def again(event):
        if event.result is not None:
            answered.append(event.result.tokens)
            if not ended:
                submit_short()

    def submit_short():
        engine.submit(request(5, max_new_tokens=1, on_event=again))

    ended = []
    stream = engine.submit(request(0, max_new_tokens=NEW))
    for _ in range(4):
        submit_short()
    for _ in range(4 * NEW):
        events = engine.step()
        ended += [event.result for event in events if event.id == stream and event.result]
        if ended:
            break
    assert ended[0].tokens == alone[0]
    # 15 tokens beyond the first, by bursts of a quarter of 4 steps: others wait, and rows are free.
    assert diary.entries == ["read", 1] * 15
    assert len(pauses) == 14  # the stream's own delayed nobody
    assert all(seconds > 0 for seconds in pauses)
    drain(engine)
    assert set(map(tuple, answered)) == {tuple(alone[5][:1])}


def test_bursts_are_short_while_requests_wait_for_free_rows(model, alone, monkeypatch):
    engine = make_engine(model, burst=8)
    diary = Diary(engine, monkeypatch)
    for i in (0, 2, 5):
        engine.submit(request(i))
    ended = results(drain(engine))
    assert [ended[i].tokens for i in range(3)] == [alone[i] for i in (0, 2, 5)]
    assert diary.entries[:6] == ["read", 2, "read", 2, "read", 8]


def read_piece_by_piece(engine, monkeypatch):
    """Running rows wait for one piece at a time."""
    monkeypatch.setattr(engine, "_max_stall_s", 1e-9)


def test_running_rows_decode_between_the_pieces_of_a_prompt(engine, alone, monkeypatch):
    diary = Diary(engine, monkeypatch)
    stream = engine.submit(request(0, max_new_tokens=NEW))
    engine.step()
    read_piece_by_piece(engine, monkeypatch)
    late, last = engine.submit(request(2)), engine.submit(request(5))
    ended = results(drain(engine))
    assert [ended[id].tokens for id in (stream, late, last)] == [alone[i] for i in (0, 2, 5)]
    # Two layers are two pieces, and then the cache is put together. Bursts are short while a prompt
    # is read, or another waits.
    assert diary.entries == ["read", 4, "read", 1, 1, 1, "read", 1, 1, *[4] * 4]


@pytest.mark.parametrize(("step", "expected"), [(0.5, 1.0), (3.0, 3.0), (50.0, 10.0)])
def test_prompts_are_read_as_long_as_a_step_takes(engine, monkeypatch, step, expected):
    given = []
    monkeypatch.setattr(Opening, "advance", lambda self, seconds: given.append(seconds))
    monkeypatch.setattr(engine, "_max_stall_s", 1.0)
    monkeypatch.setattr(engine, "_step_s", step)
    id = engine.submit(request(0))
    engine.step()
    engine.cancel(id)
    engine.step()
    assert given == [expected]
    assert engine._opening is None


def test_the_time_of_a_step_is_measured(engine):
    engine.run([request(0)])
    assert 0 < engine._step_s < 60


@pytest.mark.parametrize("why", ["cancelled", "error"])
def test_a_request_may_end_between_its_pieces(engine, alone, monkeypatch, why):
    stream = engine.submit(request(0))
    engine.step()
    read_piece_by_piece(engine, monkeypatch)
    if why == "error":
        monkeypatch.setattr(pieces, "_close", None)
    gone, waiting = engine.submit(request(2)), engine.submit(request(5))
    engine.step()
    with pytest.raises(ValueError, match="warm up before the first request"):
        engine.warm_up([3])
    if why == "cancelled":
        engine.cancel(gone)
    events = []
    while gone not in results(events):
        events += engine.step()
    monkeypatch.undo()
    ended = results(events + drain(engine))
    assert ended[gone].finish == why
    assert ended[gone].tokens == []
    assert [ended[id].tokens for id in (stream, waiting)] == [alone[i] for i in (0, 5)]


def test_a_request_cancelled_in_the_queue_is_never_read(engine, monkeypatch):
    diary = Diary(engine, monkeypatch)
    ids = [engine.submit(request(i)) for i in range(6)]
    heard = []

    def cancel_others(event):
        heard.append(event)
        for id in ids:
            engine.cancel(id)

    first = engine.submit(request(1, max_new_tokens=1, on_event=cancel_others))
    for id in ids[:3]:
        engine.cancel(id)
    engine.step()
    assert diary.entries.count("read") == 1
    for id in ids[3:]:
        engine.cancel(id)
    ended = results(drain(engine))
    assert ended[first].finish == "length"
    assert diary.entries.count("read") == 2
    assert len(heard) == 1


def test_rows_are_shared_between_tenants():
    def waiting(id, tenant):
        encoded = EncodedRequest(
            tokens=[1], document=0, max_new_tokens=1, sampling=GREEDY, seed=0, eos_ids=(),
            tenant=tenant,
        )  # fmt: skip
        return ActiveRequest(id, Request(prompt=[1], max_new_tokens=1), encoded, None)

    queue = RequestQueue()
    queue.add([waiting(i, "a") for i in range(6)])

    def take(running):
        (request,) = queue.take(running, 1, len)
        return request

    running = [take([]).encoded.tenant for _ in range(3)]  # alone, a tenant has all rows
    queue.add([waiting(i, "b") for i in (10, 11, 12, 13)])
    taken = []
    for _ in range(6):
        taken.append(take(running))
        running.append(taken[-1].encoded.tenant)
    # The tenant with fewer rows is next; with as many, the one that was served longer ago.
    assert [request.id for request in taken] == [10, 11, 12, 3, 13, 4]
    # Several free rows at once: the same order.
    queue = RequestQueue()
    queue.add([waiting(i, "a") for i in range(3, 6)])
    queue.add([waiting(i, "b") for i in (10, 11, 12, 13)])
    assert [request.id for request in queue.take(["a"] * 3, 6, lambda order: 4)] == [10, 11, 12, 3]
    assert [request.id for request in queue.take(["a"] * 4 + ["b"] * 3, 2, len)] == [13, 4]
    # One row: three tenants have it by turns.
    queue = RequestQueue()
    queue.add([waiting(i, "a") for i in range(3)])
    queue.add([waiting(i, "b") for i in range(10, 13)])
    queue.add([waiting(20, "c")])
    order = [take([]).id for _ in range(7)]
    assert sorted(order[:3]) == [0, 10, 20]
    assert sorted(order[3:5]) == [1, 11]
    assert queue.take([], 1, len) == []


class Panic(BaseException):
    """As pyo3 raises it: no Exception."""


@pytest.mark.parametrize("at", ["push", "finish"])
def test_a_panic_while_decoding_text_ends_one_request(model, engine, alone, monkeypatch, at):
    stream_of = type(model.tokenizer).stream

    def stream(self, **options):
        stream = stream_of(self, **options)

        def panic(*_):
            raise Panic("called `Option::unwrap()` on a `None` value")

        if not streams:
            setattr(stream, at, panic)
        streams.append(stream)
        return stream

    streams = []
    monkeypatch.setattr(type(model.tokenizer), "stream", stream)
    failed, other = engine.run([request(0), request(0)])
    assert failed.finish == "error"
    assert "the output cannot be decoded" in failed.error
    assert "Panic" in failed.error
    assert other.tokens == alone[0]
    assert engine._rows == [None] * 3


def test_an_interrupt_while_a_prompt_is_read_leaves_a_usable_engine(engine, alone, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as context:
        context.setattr(engine._reader, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.run([request(0)])
    assert engine.alive == 0
    assert engine.run([request(0)])[0].tokens == alone[0]


def test_stop_strings_and_ends_are_each_requests_own(model, engine, alone):
    decode = model.tokenizer.decode
    text = decode(alone[0])
    stop = text[6:8]
    eos = alone[0][3]
    stopped, ended, also, free = engine.run(
        [
            request(0, stop=[stop]),
            request(0, eos_ids=[319, eos]),
            request(0, eos_ids=[319], stop_token_ids=[eos]),
            request(0),
        ]
    )
    assert also.tokens == ended.tokens
    assert stopped.finish == "stop"
    assert stopped.text == text[: text.find(stop)]
    assert ended.finish == "eos"
    assert ended.tokens == alone[0][: alone[0].index(eos) + 1]
    assert free.finish == "length"
    assert free.tokens == alone[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompt=[1] * 33), "33 tokens, more than max_prompt_tokens = 32"),
        (dict(prompt=[]), "empty"),
        (dict(prompt=[320]), "outside the vocabulary"),
        (dict(max_new_tokens=NEW + 1), f"max_new_tokens = {NEW} tokens, not {NEW + 1}"),
        (dict(max_new_tokens=0), "not 0"),
        (dict(eos_ids=range(MAX_EOS_IDS + 1)), "eos_ids"),
        (dict(stop=[""]), "stop string is empty"),
        (dict(stop="a"), "are a list"),
        (dict(prompt=[2**31]), "outside the vocabulary"),
        (dict(max_new_tokens=2.5), "max_new_tokens must be an integer, not 2.5"),
        (dict(seed=1.5), "seed must be an integer, not 1.5"),
        (dict(prompt="a" * 70_000), "70000 bytes, more than the 65536 that max_prompt_tokens = 32"),
    ],
)
def test_what_cannot_be_served_is_refused_when_submitted(engine, change, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(request(0, **change))
    with pytest.raises(ValueError, match=message):
        engine.run([request(1), request(0, **change)])
    assert engine.alive == 0


def test_sizes_below_one_are_refused(model):
    with pytest.raises(ValueError, match="rows must be at least 1, not 0"):
        make_engine(model, rows=0)
    with pytest.raises(ValueError, match="max_stall_s must be above 0, not 0"):
        make_engine(model, max_stall_s=0)
    with pytest.raises(ValueError, match=r"burst must be an integer, not 2\.5"):
        make_engine(model, burst=2.5)
    with pytest.raises(ValueError, match=r"max_new_tokens must be an integer, not 2\.5"):
        make_engine(model, max_new_tokens=2.5)
    with pytest.raises(ValueError, match="max_prompt_tokens must be at least 1"):
        make_engine(model, max_new_tokens=64, max_prompt_tokens=None)


def test_nothing_to_do(engine):
    assert engine.step() == []
    assert engine.run() == []
    assert not engine.wait(0.0)
    assert not engine.cancel(12345)


class Moody:
    """A host drafter that fails for prompts that begin with a given token."""

    def __init__(self):
        self.open = set()
        self.tempers = {}

    def begin(self, request, prompt):
        if prompt[0] == 1:
            raise RuntimeError("no room")
        self.open.add(request)
        self.tempers[request] = prompt[0]

    def observe(self, request, tokens):
        assert request in self.open

    def propose(self, request, nodes, depth):
        if self.tempers[request] == 2:
            raise RuntimeError("no idea")
        return Draft(np.zeros(0, np.int32), np.zeros(0, np.int32))

    def end(self, request):
        self.open.remove(request)


def test_errors_end_requests_and_leak_no_row(model, engine, alone):
    drafter = Moody()
    moody = make_engine(model, drafter=drafter, draft_nodes=8)
    bad = [request(0, prompt=[1, 5, 6]), request(0, prompt=[2, 5, 6])]
    begun, proposed, neighbour = moody.run([*bad, request(0)])
    assert neighbour.tokens == alone[0]
    assert begun.finish == proposed.finish == "error"
    assert begun.error == "RuntimeError: no room"
    assert begun.tokens == []
    assert proposed.error == "RuntimeError: no idea"
    assert len(proposed.tokens) == 1
    assert [r.tokens for r in moody.run([request(0), request(2)])] == [alone[0], alone[2]]
    assert drafter.open == set()
    with pytest.raises(RowError, match="no idea"):
        generate(
            model, [[2, 5, 6]], policy=POLICY, budget=BUDGET, max_new_tokens=NEW, eos_ids=(),
            drafter=drafter, draft_nodes=8,
        )  # fmt: skip
    drafting = Drafting(drafter, 8, config=model.config, batch=2, room=8)
    with pytest.raises(RuntimeError, match="no room"):
        drafting.begin(moody._batch._state, [[3], [1]], jnp.asarray([[3], [1]]))
    assert drafter.open == set()

    def fail(event):
        raise ValueError("the client is gone")

    gone, *others = engine.run([request(0, on_event=fail), request(0), request(2), request(5)])
    assert gone.finish == "error"
    assert gone.error == "ValueError: the client is gone"
    assert [r.tokens for r in others] == [alone[0], alone[2], alone[5]]


def test_any_thread_may_submit_and_cancel(engine, alone):
    heard, stop = {}, threading.Event()

    def work():
        while not stop.is_set():
            if engine.wait(0.05):
                engine.step()

    def client(i):
        for _ in range(3):
            events, ended = [], threading.Event()

            def listen(event, events=events, ended=ended):
                events.append(event)
                if event.result is not None:
                    ended.set()

            id = engine.submit(request(i, on_event=listen))
            if i == 3:
                engine.cancel(id)
            assert ended.wait(60)
            heard.setdefault(i, []).append(events[-1].result)

    worker = threading.Thread(target=work)
    clients = [threading.Thread(target=client, args=(i,)) for i in range(6)]
    for thread in [worker, *clients]:
        thread.start()
    for thread in clients:
        thread.join()
    stop.set()
    worker.join()
    assert engine.alive == engine.waiting == 0
    for i in range(6):
        assert len(heard[i]) == 3
        if i != 3:
            assert all(result.tokens == alone[i][: LIMITS[i]] for result in heard[i])


@pytest.mark.parametrize("kind", ["modules", "two_pass", "replay"])
def test_policies_that_read_more_than_the_prompt(model, kind):
    modules = None
    policy = Oracle(response_tokens=2) if kind == "two_pass" else KVzip(allocate="layer")
    if kind == "modules":
        policy = LookaheadKV()
        sizes = LookaheadConfig(tokens=2, rank=0, alpha=1.0, targets=(), init="normal")
        modules = init_modules(jax.random.key(0), sizes, model.config)
    given = dict(policy=policy, budget=BUDGET, lookahead=modules)
    expected = generate(
        model, [PROMPTS[0]], max_new_tokens=NEW, sampling=SETTINGS[0], eos_ids=(), **given
    ).tokens[0]
    for result in make_engine(model, **given).run([request(0), request(0)]):
        assert result.tokens == expected


def test_a_filter_that_is_off_changes_nothing_beside_one_that_is_on():
    logits = jnp.asarray(np.linspace(0, -30, 400), jnp.float32)  # sums to 1 long before its end
    rows = sampling_rows(
        [Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.5)], [0, 0], 400
    )
    out = process_logits(jnp.stack([logits, logits])[:, None], TextSoFar(None, None), rows)
    np.testing.assert_array_equal(out[0, 0], logits)
    assert np.isneginf(np.asarray(out[1, 0])).any()
