"""Drafted output is undrafted output: every drafter, tree, batch and setting, and the cache too.

A few compiled programs cover all pairs of what matters; the full product runs with `--full`, and
tests/test_engine.py has rows that join.
"""

import dataclasses
import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lookahead_jax.decoding.constraints import everything
from lookahead_jax.decoding.drafted import Drafting
from lookahead_jax.decoding.grammar import GrammarRow
from lookahead_jax.decoding.node_choice import Controller, Plan
from lookahead_jax.decoding.sampling import GREEDY
from lookahead_jax.decoding.tree import NODE_BUCKETS
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.model.cache import Entries, commit
from lookahead_jax.model.sharding import make_mesh
from tests import tiny
from tests.drafted import (
    BATCHES,
    KINDS,
    NEW,
    POLICIES,
    PROMPTS,
    SETTINGS,
    Scripted,
    Shared,
    decision,
    denoiser,
    draft_model,
    ends,
    kind,
    opened,
    other_vocabulary,
    perfect,
    run,
    said,
    taught,
    trusting_head,
    undrafted,
)
from tests.small_model_drafts import ROWS, assert_branches, assert_chains


def check(case):
    """Runs a case; drafters that know or have learned the text must have gained by it."""
    texts, _ = undrafted(case.policy, ends(case.policy) if case.ended else ())
    nodes = Shared(case.nodes) if case.shared else case.nodes
    given = (case.policy, case.batch, nodes, case.ended, case.poison)
    if case.shared and isinstance(case.drafter, int):
        state, _ = run(Scripted(texts, case.drafter), *given)
        emitted = np.asarray(state.lengths) @ np.arange(1, 129)
        np.testing.assert_array_equal(state.reached[:, NODE_BUCKETS.index(case.nodes)], emitted)
    elif isinstance(case.drafter, int):
        state, same = run(Scripted(texts, case.drafter), *given)
        for i, r in enumerate(BATCHES[case.batch]):
            if kind(r, case.drafter) is perfect and r in same:
                emitted = np.repeat(np.arange(1, 129), np.asarray(state.lengths[i]))
                assert len(emitted) == -(-(len(texts[r]) - 1) // case.nodes)
                # A chain cut to so many nodes would have emitted as many tokens at most.
                np.testing.assert_array_equal(
                    state.reached[i], [np.minimum(emitted, n).sum() for n in NODE_BUCKETS]
                )
    elif case.drafter in DEVICE:
        drafter, steps, rows = DEVICE[case.drafter](), [], BATCHES[case.batch]
        restated = RESTATED.get(case.drafter)
        state, _ = run(drafter, *given, on_step=steps.append if restated else None)
        LEARNED[case.drafter](state, rows)
        if restated and set(ROWS) <= set(rows):
            restated(steps, rows, drafter)
    else:
        state, _ = run(taught(case.drafter, texts), *given)
        lengths = np.asarray(state.lengths).sum(0)
        assert (lengths @ np.arange(1, lengths.size + 1)) / lengths.sum() > 2


def learned_model(state, rows):
    """Its cache holds prompt and output, as far as the target's does."""
    np.testing.assert_array_equal(state.draft.whole().next_pos, state.cache.next_pos)


def learned_lookup(state, rows):
    for i, r in enumerate(rows):  # all but the root, which is pending
        text = np.asarray(state.tokens[i, : int(state.count[i]) - 1]).tolist()
        length = int(state.draft.length[i])
        assert np.asarray(state.draft.tokens[i, :length]).tolist() == PROMPTS[r] + text


def learned_recycling(state, rows):
    known = np.asarray(state.draft[:, 0]) >= 0
    for i in range(len(rows)):
        assert known[np.asarray(state.tokens[i, : int(state.count[i]) - 1])].all()


def learned_stand(state, rows):
    """Every token but the pending root has a line of its own, from when it was read."""
    drafter = make_drafter("stand")
    for i in range(len(rows)):
        text = state.tokens[i, : int(state.count[i]) - 1]
        known = drafter._candidates(
            state.draft, text[None, :, None].repeat(4, -1).at[..., :3].set(-1)
        )
        assert (np.asarray(known[..., 0]) >= 0).all()
        end = [*PROMPTS[rows[i]], *np.asarray(text).tolist()][-3:]
        assert np.asarray(state.draft.tail[i]).tolist() == [-1] * (3 - len(end)) + end


def learned_mixture(state, rows):
    """Each drafter has learned what it learns alone, and the weights have moved."""
    for own, learned in zip(state.draft.own, (learned_recycling, learned_model), strict=True):
        learned(dataclasses.replace(state, draft=own), rows)
    means = np.asarray(state.draft.means)
    assert (means != 1.0).any(0).all()


def learned_agreement(state, rows):
    """The steps' tokens on which one or two layers agreed with all three; some were drafted."""
    np.testing.assert_array_equal(state.draft.read, np.asarray(state.count) - 1)
    assert np.asarray(state.lengths)[:, 1:].sum() > 0
    whole = np.asarray(state.cache.length[0, :, 0] == state.cache.next_pos)  # nothing was evicted
    assert whole.any()
    for i, row in enumerate(rows):
        first, *emitted = np.asarray(state.tokens[i, : int(state.count[i])]).tolist()
        text = [*PROMPTS[row], first, *emitted]
        if not whole[i]:
            continue
        for exit, layers in enumerate((1, 2)):
            shadow = said(layers, text)[len(PROMPTS[row]) : -1]
            same = sum(a == b for a, b in zip(shadow, emitted, strict=True))
            assert int(state.draft.agreed[i, exit]) == same


def learned_hidden(state, rows):
    """The state that chose the last token: what greedy rows took of it is known."""
    table = np.asarray(tiny.params(tiny.config())["embed"])
    for i, r in enumerate(rows):
        count = int(state.count[i])
        assert bool(state.draft.known[i]) == (count > 1)
        if count > 1 and SETTINGS[r] == GREEDY:
            choice = np.argmax(table @ np.asarray(state.draft.hidden[i]))
            assert choice == state.tokens[i, count - 1]


DEVICE = {
    "prompt_lookup": partial(make_drafter, "prompt_lookup"),
    "recycling": partial(make_drafter, "recycling"),
    "draft_model": partial(draft_model, depth=2),
    "stand": partial(make_drafter, "stand"),
    "recycling+draft_model": partial(draft_model, "recycling+draft_model", depth=2),
    "early_exit": partial(make_drafter, "early_exit", memory=1.0),
    "specdec": lambda: draft_model("specdec", head=trusting_head()),
    "cascade": partial(draft_model, "cascade"),
    "denoiser": denoiser,
}
LEARNED = {
    "prompt_lookup": learned_lookup,
    "recycling": learned_recycling,
    "draft_model": learned_model,
    "stand": learned_stand,
    "recycling+draft_model": learned_mixture,
    "early_exit": learned_agreement,
    "specdec": learned_model,
    "cascade": learned_model,
    "denoiser": learned_hidden,
}
RESTATED = {"specdec": assert_chains, "cascade": assert_branches}
# Their drafts have too few nodes for WATCHED.
SMALL = ("draft_model", "recycling+draft_model", "early_exit", "specdec", "cascade")
HOST = ("trie", "suffix", "trie+suffix", "sam", "aded")
WATCHED = 32  # nodes of the drafts that are watched; programs that other tests use, too


class Case(NamedTuple):
    drafter: str | int  # a number is the shift of the scripted one
    batch: int
    nodes: int
    policy: str
    ended: bool
    poison: bool

    @property
    def shared(self):
        """Whether the rows share their nodes."""
        return (self.batch, self.nodes) in ((8, 32), (3, 16))


# Settings of the runs below, found by trying; test_the_cases_cover_every_pair holds them.
CHOSEN = "663732641654544600740122515632500074763733271527044506250"


def cases():
    """Each drafter with each program; policy, ends and NaN so that their pairs are there too."""
    runs = [(shift, 8, 8) for shift in range(7)] + [(3, 8, 32), (6, 8, 32)]
    runs += [(shift, 3, 16) for shift in (0, 2, 5)] + [(shift, 1, 64) for shift in range(7)]
    runs += [(name, *program) for name in HOST for program in ((8, 8), (8, 32), (3, 16), (1, 64))]
    runs += 2 * [(name, 8, 8 if name in SMALL else WATCHED) for name in DEVICE]
    settings = list(itertools.product(POLICIES, (True, False), (True, False)))
    for (drafter, batch, nodes), setting in zip(runs, map(int, CHOSEN), strict=True):
        yield Case(drafter, batch, nodes, *settings[setting])


CASES = list(cases())


def label(case):
    flags = ("-ended" if case.ended else "") + ("-nan" if case.poison else "")
    return f"{case.drafter}-{case.policy}-{case.batch}x{case.nodes}{flags}"


@pytest.mark.parametrize("case", CASES, ids=label)
def test_drafting_leaves_tokens_and_cache_as_they_were(case):
    check(case)


def missing_pairs(cases):
    """Drafters, the kinds of scripted trees among them, with all else, and all else in pairs."""
    found = set()
    for case in cases:
        for row in BATCHES[case.batch]:
            who = kind(row, case.drafter) if isinstance(case.drafter, int) else case.drafter
            values = dict(case._asdict(), drafter=who, setting=row)
            found |= set(itertools.combinations(values.items(), 2))
    who = [*KINDS, *HOST]
    wanted = {
        "batch": [8, 3, 1], "nodes": [8, 32, 16, 64], "policy": list(POLICIES),
        "ended": [True, False], "poison": [True, False], "setting": list(range(8)),
    }  # fmt: skip
    programs = {"batch", "nodes", "setting"}  # rows and nodes of a program go together
    missing = [
        ((a, x), (b, y))
        for a, b in itertools.combinations(wanted, 2)
        if not {a, b} <= programs
        for x, y in itertools.product(wanted[a], wanted[b])
        if ((a, x), (b, y)) not in found
    ]
    for name, values in wanted.items():
        fixed = [] if name in ("batch", "nodes") else list(DEVICE)
        missing += [
            (drafter, name, value)
            for drafter, value in itertools.product([*who, *fixed], values)
            if (("drafter", drafter), (name, value)) not in found
        ]
    return missing


def test_the_cases_cover_every_pair():
    assert not missing_pairs(CASES)


@pytest.mark.full
@pytest.mark.parametrize("nodes", NODE_BUCKETS[1:])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("drafter", [*range(len(KINDS)), *HOST, *DEVICE])
def test_full_product(drafter, batch, nodes):
    for policy, ended, poison in itertools.product(POLICIES, (True, False), (True, False)):
        check(Case(drafter, batch, nodes, policy, ended, poison))


class Watcher(Controller):
    """Decodes plainly beside drafts that it watches, and keeps what it is told of them."""

    affords_watching, watch = True, None

    def __init__(self, nodes):
        super().__init__((1, *(n for n in NODE_BUCKETS[1:] if n <= nodes)))
        self.watch, self.told = nodes, []

    def choose(self, burst, *, watchable=True, behind=False):
        return Plan(1, burst, 0 if behind or not watchable else self.watch)

    def record_watched(self, gains, sizes, seconds):
        assert seconds is None or seconds > 0
        self.told.append((gains, sizes))


def decoded(drafter, nodes, steps):
    """The accepted nodes, `reached`, of one `advance` after so many plain steps."""
    model, rows = tiny.config(), BATCHES[8]
    state, tokens = opened("full", rows, ())
    settings = dict(config=model, batch=8, room=64 + NEW)
    plain = Drafting(drafter, 1, **settings)
    state = plain.begin(state, [PROMPTS[r] for r in rows], tokens)
    state = plain.advance(tiny.params(model), state, steps)
    before = np.array(state.reached)
    chosen = Drafting(drafter, nodes, **settings)
    state = chosen.advance(tiny.params(model), state, NEW if isinstance(nodes, Watcher) else 1)
    return np.asarray(state.reached) - before


@pytest.mark.parametrize("drafter", ["prompt_lookup", "recycling"])
def test_a_draft_that_is_watched_is_worth_what_it_emits_where_it_runs(drafter):
    watcher = Watcher(WATCHED)
    decoded(make_drafter(drafter), watcher, 6)
    ran = decoded(make_drafter(drafter), Shared(WATCHED), 6)
    ran = ran[ran[:, 0] > 0].mean(0)
    ((gains, sizes),) = watcher.told
    compared = [n for n in NODE_BUCKETS if n <= WATCHED]
    assert gains == {n: pytest.approx(ran[NODE_BUCKETS.index(n)]) for n in compared}
    assert ran[1] > 1
    assert sizes[WATCHED] == WATCHED


@pytest.mark.parametrize("drafter", [*range(len(KINDS)), "trie", "suffix"])
def test_watching_behind_plain_steps_goes_the_way_of_drafted_steps(drafter):
    """One row, whose whole output is emitted before its drafts are watched."""
    texts, _ = undrafted("full", ())
    row, scripted = BATCHES[1][0], isinstance(drafter, int)

    def make():
        return Scripted(texts, drafter) if scripted else make_drafter(drafter)

    state, tokens = opened("full", [row], ())
    settings = dict(config=(model := tiny.config()), batch=1, room=64 + NEW)
    drafted = Drafting(make(), 8, **settings)
    state = drafted.begin(state, [PROMPTS[row]], tokens)
    while not np.asarray(state.done).all():
        state = drafted.advance(tiny.params(model), state, 1)
    reached, steps = np.asarray(state.reached)[0], int(state.lengths.sum())

    watcher = Watcher(8)
    behind = Drafting(make(), watcher, **settings)
    state, tokens = opened("full", [row], ())
    state = behind.begin(state, [PROMPTS[row]], tokens)
    state = behind.advance(tiny.params(model), state, NEW)
    behind.end(state)
    assert len(watcher.told) == steps
    for bucket in (1, 8):
        total = sum(gains[bucket] for gains, _ in watcher.told)
        assert total == reached[NODE_BUCKETS.index(bucket)]


class Anything(GrammarRow):
    """A grammar that allows everything."""

    def __init__(self):
        pass

    def observe(self, tokens):
        pass

    def masks(self, tokens, parents):
        return everything(1, len(tokens), vocab_size=97)[0], np.ones(len(tokens), bool)


def test_drafts_are_proposed_before_a_step_that_follows_a_grammar():
    model, (row,) = tiny.config(), BATCHES[1]
    state, tokens = opened("full", [row])
    drafting = Drafting(make_drafter("early_exit"), 8, config=model, batch=1, room=64 + NEW)
    state = drafting.begin(state, [PROMPTS[row]], tokens)
    drafting.constrain(0, Anything())
    full = jnp.ones_like(state.draft.agreed)
    while not np.asarray(state.done).all():
        draft = dataclasses.replace(state.draft, agreed=full, read=full[:, 0])
        state = drafting.advance(tiny.params(model), dataclasses.replace(state, draft=draft), 1)
    emitted = np.asarray(state.tokens[0, : int(state.count[0])]).tolist()
    tiny.same_tokens(emitted, undrafted("full")[0][row], partial(decision, "full", row))
    assert len(emitted) - 1 > int(state.lengths.sum())


@pytest.mark.parametrize(("drafter", "watchable"), [("draft_model", True), ("drawn_model", False)])
def test_drawn_trees_are_not_watched(drafter, watchable):
    asked = []

    class Asked(Controller):
        def choose(self, burst, *, watchable=True, behind=False):
            assert not behind
            asked.append(watchable)
            raise InterruptedError  # before anything is compiled

    drafting = Drafting(draft_model(drafter), Asked(), config=tiny.config(), batch=8, room=64 + NEW)
    with pytest.raises(InterruptedError):
        drafting.advance(tiny.params(tiny.config()), opened("full", BATCHES[8])[0], 16)
    assert asked == [watchable]


@pytest.mark.parametrize(
    ("policy", "ended", "poison"), [("full", False, True), ("snapkv", True, False)]
)
def test_a_draft_model_with_other_tokens_drafts_for_itself(policy, ended, poison):
    """The target with its ids in another order; some of its tokens are no text."""
    state, _ = run(other_vocabulary(), policy, 8, 8, ended, poison)
    lengths = np.asarray(state.lengths).sum(0)
    assert (lengths @ np.arange(1, lengths.size + 1)) / lengths.sum() > 2


def test_a_draft_model_must_be_where_the_target_is():
    state, tokens = opened("snapkv", BATCHES[1])
    prompts = [PROMPTS[row] for row in BATCHES[1]]
    everywhere = NamedSharding(make_mesh(), PartitionSpec())
    state = jax.device_put(state, everywhere)
    drafter = draft_model()

    def begin(place):
        params = jax.device_put(drafter.model.params, place)
        placed = dataclasses.replace(
            drafter, model=dataclasses.replace(drafter.model, params=params)
        )
        drafting = Drafting(placed, 8, config=tiny.config(), batch=1, room=tokens.shape[1] + NEW)
        return drafting.begin(state, prompts, jax.device_put(tokens, everywhere))

    with pytest.raises(ValueError, match=r"on 1 of the devices and the target on 4: .* mesh="):
        begin(jax.devices()[0])
    assert begin(everywhere).draft.cache.next_pos.tolist() == [len(prompts[0])]


def test_a_token_that_was_not_chosen_is_no_near_tie():
    """The scores that excuse a difference are those of the run, noise and processors included."""
    row, (texts, _) = 5, undrafted("snapkv")
    before, chosen = texts[row][:-1], texts[row][-1]
    assert int(np.argmax(decision("snapkv", row, before))) == chosen
    with pytest.raises(AssertionError, match="margin"):
        tiny.same_tokens([*before, (chosen + 1) % 97], texts[row], partial(decision, "snapkv", row))


def test_rejected_rows_are_not_stored():
    """NaN in every row of a block but the accepted ones reaches no slot."""
    state, _ = opened("snapkv", BATCHES[3])
    cache, before = state.cache, jax.tree.map(np.asarray, state.cache)
    shape = (*cache.k.shape[:3], 4, cache.k.shape[4])
    k = jnp.full(shape, jnp.nan).at[..., 2, :].set(1.0).at[..., 0, :].set(2.0)
    path = jnp.asarray([[0, 2, 1, 1]] * 3, jnp.int32)
    positions = jnp.asarray([[50, -1, 51, 52]] * 3, jnp.int32)
    count = jnp.asarray([2, 0, 1], jnp.int32)
    after = jax.jit(commit)(cache, Entries(k, k, positions, path, count))
    assert np.isfinite(np.asarray(after.k)).all()
    np.testing.assert_array_equal(after.length, before.length + np.asarray(count)[None, :, None])
    np.testing.assert_array_equal(after.pos[:, 1], before.pos[:, 1])
