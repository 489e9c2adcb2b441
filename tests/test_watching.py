"""Watched host drafts, along texts that are known beforehand: what they promise, and when."""

import dataclasses
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.decoding.draft_estimates import TUNING
from lookahead_jax.decoding.draft_packing import followed
from lookahead_jax.decoding.drafted import Drafting
from lookahead_jax.decoding.host_drafter import Draft
from lookahead_jax.decoding.node_budget import affordable
from lookahead_jax.decoding.node_choice import Controller, Plan
from lookahead_jax.decoding.row_error import RowError
from tests import tiny
from tests.drafted import opened

COSTS = {1: 1.0, 8: 1.4, 16: 1.9, 32: 2.9, 64: 5.0, 128: 9.0}
STEP_S = 30e-3  # seconds of a plain step


class Clock:
    """Stands still but for what steps and drafts are said to take."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)


class Oracle:
    """Knows the text: right tokens up to `reach(place)`, then one wrong. Writes down all calls."""

    def __init__(self, clock, texts, reach, seconds=0.0):
        self.clock, self.texts, self.reach, self.seconds = clock, texts, reach, seconds
        self.rows, self.seen, self.places = {}, {}, []

    def begin(self, request, prompt):
        self.rows[request], self.seen[request] = prompt[0], []

    def observe(self, request, tokens):
        self.seen[request] += tokens
        text = self.texts[self.rows[request]]
        assert self.seen[request] == text[: len(self.seen[request])]

    def propose(self, request, nodes, depth):
        self.clock.now += self.seconds
        row, place = self.rows[request], len(self.seen[request])
        self.places.append((row, place))
        tokens = np.asarray(self.texts[row][place : place + min(nodes, depth)], np.int32)
        tokens[self.reach(place) :] = 999
        return Draft(tokens, np.arange(-1, len(tokens) - 1, dtype=np.int32))

    def end(self, request):
        del self.rows[request], self.seen[request]


class Scripted(Drafting):
    """Emits given texts; `steps` is what ran, as (nodes, steps)."""

    def __init__(self, clock, host, controller, texts):
        super().__init__(host, controller, config=tiny.config(), batch=len(texts), room=10_000)
        self.clock, self.texts, self.steps = clock, texts, []

    def _run(self, params, state, nodes, burst, drafts, *, constrained=False):
        self.steps.append((nodes, burst))
        tokens, count, done, reached = map(
            np.array, (state.tokens, state.count, state.done, state.reached)
        )
        limit = np.asarray(state.limit)
        for _ in range(burst):
            if done.all():
                break
            self.clock.now += COSTS[nodes] * STEP_S
            for row in np.flatnonzero(~done):
                at = int(count[row])
                rest = np.asarray(self.texts[row][at : limit[row]], np.int32)
                emitted, nodes_taken = 1, 1
                if nodes > 1:
                    valid, taken = followed([drafts[row]], [rest], nodes)
                    nodes_taken = (taken[..., None] & affordable(None, valid))[0].sum(0)
                    emitted = int(taken.sum())
                reached[row] += nodes_taken
                tokens[row, at : at + emitted] = rest[:emitted]
                count[row] += emitted
                done[row] = count[row] >= limit[row]
        return dataclasses.replace(
            state, tokens=jnp.asarray(tokens), count=jnp.asarray(count), done=jnp.asarray(done),
            reached=jnp.asarray(reached),
        )  # fmt: skip

    def decode(self, lengths, burst):
        """Seconds of the rows' texts up to these lengths, of which the first token is there."""
        rows = len(self.texts)
        tokens = np.full((rows, max(lengths)), -1, np.int32)
        tokens[:, 0] = [text[0] for text in self.texts]
        state = dataclasses.replace(
            opened("full", range(rows), ())[0], tokens=jnp.asarray(tokens),
            count=jnp.ones(rows, jnp.int32), limit=jnp.asarray(lengths, jnp.int32),
            done=jnp.zeros(rows, bool), reached=jnp.zeros((rows, 6), jnp.int32),
            places=jnp.zeros((rows, 2, 7), jnp.int32),
        )  # fmt: skip
        begin = self.clock.now
        self.begin(state, [[row] for row in range(rows)], state.tokens)
        while not np.asarray(state.done).all():
            state = self.advance(tiny.params(tiny.config()), state, burst)
        self.end(state)
        return self.clock.now - begin


class Plain(Controller):
    """Watches whenever it can and never drafts; `promises` are the gains of 16 nodes."""

    def __init__(self):
        super().__init__()
        self.record(1, 1, {}, 8, STEP_S)
        self.promises = []

    @property
    def affords_watching(self):
        return True

    def best(self):
        return 1

    def _candidate(self, best, watchable):
        return None

    def record_watched(self, gains, sizes, seconds):
        if gains:
            self.promises.append(gains[16])
        super().record_watched(gains, sizes, seconds)


class Switch(Plain):
    """`first` plans, then plain steps; watches only then if it is `late`."""

    def __init__(self, *first, late=False):
        super().__init__()
        self.first, self.late = list(first), late

    @property
    def affords_watching(self):
        return not (self.late and self.first)

    def choose(self, burst, *, watchable=True, behind=False):
        return self.first.pop(0) if self.first else Plan(1, burst, 0)


def text_of(seed, length=400):
    return np.random.default_rng(seed).integers(0, 900, length).tolist()


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.mark.parametrize("burst", [1, 4, 16, 50])
@pytest.mark.parametrize("worth", [1, 5, 9, 15])
def test_watched_drafts_promise_what_steps_would_emit(clock, burst, worth):
    """Wherever a burst ends: a draft that is not told apart from its text is made again."""
    texts, controller = [text_of(0)], Plain()
    host = Oracle(clock, texts, lambda place: worth - 1)
    Scripted(clock, host, controller, texts).decode([300], burst)
    assert controller.promises[:-1] == [worth] * (len(controller.promises) - 1)
    assert sum(controller.promises) == 300 - 1
    assert len(controller.promises) >= (300 - 2) // worth
    again = len(host.places) - len(set(host.places))
    assert again <= 300 / burst


def test_each_row_is_watched_along_its_own_text(clock):
    texts = [text_of(row) for row in range(3)]
    controller = Plain()
    host = Oracle(clock, texts, lambda place: 4)
    Scripted(clock, host, controller, texts).decode([40, 300, 81], 16)
    for row, length in enumerate((40, 300, 81)):
        places = sorted({place for at, place in host.places if at == row})
        assert places == list(range(1, length - 1, 5))


def test_no_draft_is_watched_along_what_drafted_steps_emitted(clock):
    texts, controller = [text_of(0)], Controller()
    host = Oracle(clock, texts, lambda place: 7, seconds=30e-6)
    drafting = Scripted(clock, host, controller, texts)
    drafting.decode([300], 16)
    steps = sum(nodes > 1 for nodes, _ in drafting.steps)
    assert steps > 25
    watched = len(host.places) - steps
    assert watched <= 4  # of the plain steps before
    # Places may be drafted once for watching and once more when drafting begins there.
    assert sum(n > 1 for n in Counter(host.places).values()) <= 2


@pytest.mark.parametrize("burst", [1, 4, 16])
@pytest.mark.parametrize("length", [4, 8, 12, 17])
def test_answers_shorter_than_a_burst_are_learned_from(clock, length, burst):
    texts, controller = [text_of(0)], Controller()
    host = Oracle(clock, texts, lambda place: 20, seconds=30e-6)
    seconds = [Scripted(clock, host, controller, texts).decode([length], burst) for _ in range(24)]
    assert np.mean(seconds[-12:]) < 0.75 * (length - 1) * STEP_S


def test_a_controller_that_ends_with_the_answer_is_not_told_of_its_end(clock):
    texts = [text_of(0)]
    host = Oracle(clock, texts, lambda place: 0)
    Scripted(clock, host, None, texts).decode([9], 16)
    assert not host.places


def test_a_step_in_which_no_drafted_row_went_on_tells_nothing(clock):
    """Its logits were not finite, say, while a row without drafts ran beside it."""

    class Stuck(Scripted):
        def _run(self, params, state, nodes, burst, drafts, *, constrained=False):
            after = super()._run(params, state, nodes, burst, drafts, constrained=constrained)
            if nodes == 1:
                return after
            return dataclasses.replace(
                after, count=after.count.at[0].set(state.count[0]),
                reached=after.reached.at[0].set(state.reached[0]), done=after.done.at[0].set(True),
            )  # fmt: skip

    texts, controller = [text_of(0), text_of(1)], Controller()
    host = Oracle(clock, texts, lambda place: 20)
    Scripted(clock, host, controller, texts[:1]).decode([200], 16)
    assert controller.best() > 1
    drafting = Stuck(clock, host, controller, texts)
    join = drafting.join
    drafting.join = lambda row, prompt: join(row, prompt, draft=row == 0)
    drafting.decode([50, 50], 16)
    assert drafting.steps[0][0] > 1


def test_watching_begins_behind_what_drafted_steps_emitted(clock):
    texts, controller = [text_of(0)], Switch(*[Plan(8, 1, 0)] * 10)
    host = Oracle(clock, texts, lambda place: 2)
    Scripted(clock, host, controller, texts).decode([100], 16)
    places = [place for _, place in host.places]
    assert places[:10] == list(range(1, 31, 3))
    assert set(places[10:]) == set(range(31, 100, 3))


def test_old_text_is_not_watched(clock):
    texts, controller = [text_of(0)], Switch(*[Plan(1, 16, 0)] * 10, late=True)
    host = Oracle(clock, texts, lambda place: 0)
    Scripted(clock, host, controller, texts).decode([200], 16)
    assert host.places
    assert min(place for _, place in host.places) >= 161 - 16 - controller.watch


def test_watching_is_paid_for(clock):
    texts, seconds = [text_of(0)], 5e-3
    host = Oracle(clock, texts, lambda place: 0, seconds=seconds)
    Scripted(clock, host, Controller(), texts).decode([300], 16)
    assert 0 < len(host.places) * seconds < (2 * TUNING.exploration) * 300 * STEP_S


def test_a_failed_drafted_step_is_not_observed_again(clock):
    """The drafter was asked for all rows before it failed for one."""

    class Failing(Oracle):
        def propose(self, request, nodes, depth):
            if self.rows[request] == 1:
                raise RuntimeError("no draft")
            return super().propose(request, nodes, depth)

    texts, controller = [text_of(0), text_of(1)], Switch(Plan(1, 4, 0), Plan(8, 1, 0))
    host = Failing(clock, texts, lambda place: 0)
    drafting = Scripted(clock, host, controller, texts)
    with pytest.raises(RowError):
        drafting.decode([50, 50], 16)
    assert host.places == [(0, 5)]
    drafting.leave(0, np.asarray(texts[0][:5], np.int32))
    assert host.places == [(0, 5)]


def test_a_drafter_that_fails_behind_an_answer_does_not_lose_it(clock, caplog):
    class Failing(Oracle):
        def propose(self, request, nodes, depth):
            raise RuntimeError("no draft")

    texts = [text_of(0)]
    host = Failing(clock, texts, lambda place: 0)
    Scripted(clock, host, Plain(), texts).decode([6], 16)
    assert not host.rows
    assert "behind the end of an answer" in caplog.text
