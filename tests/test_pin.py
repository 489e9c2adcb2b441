"""Pinned tokens: kept by every policy in every layer and head, while reading and while decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lookahead_jax as lk
from lookahead_jax.policies.ada import Ada
from lookahead_jax.policies.pyramidkv import PyramidKV
from lookahead_jax.policies.registry import POLICIES, make_policy
from lookahead_jax.policies.selection import raise_shares
from lookahead_jax.policies.wrapper import parts_of
from lookahead_jax.prefilling.batching import pad_drafts
from lookahead_jax.prompts.read import read_prompt
from tests import tiny
from tests.test_decode_eviction import POLICIES as CUTTING
from tests.test_decode_eviction import SHORT, model
from tests.test_policies import PLAIN, RICH, kept_sets, lookahead_modules, read, weights

LENGTHS = (70, 33, 61)
BUDGET = 24
# As many as the budget, in one row also the prompt's ends; a few; none.
PINS = [[(3, 11), (40, 52), (66, 70)], [(0, 2), (20, 23)], []]


def positions(spans):
    return [at for span in spans for at in range(*span)]


PINNED = [positions(row) for row in PINS]
NESTED = make_policy("critical:chunkkv:layers:threshold:snapkv")
ADA_PYRAMID = Ada(inner=PyramidKV(window=4, beta=20))
# Compared with the entries that they should keep, pinned ones included.
RESTATED = ("snapkv", "h2o", "streaming_llm", "random")
OTHERS = {
    **{
        name: make_policy(name)
        for name, kind in POLICIES.items()
        if name not in ("full", "rerotate", *RESTATED, *tiny.NEEDS_SETTINGS)
        and not any(type(part) is kind for part in (*parts_of(NESTED), *parts_of(ADA_PYRAMID)))
    },
    "nested": NESTED,
    "ada-pyramid": ADA_PYRAMID,
    "ada-h2o": make_policy("ada", inner="h2o", alpha=0.0),
    "kvzip": make_policy("kvzip", allocate="layer", chunk=16),  # kvzip+ is global
    "oracle": make_policy("oracle", response_tokens=8),  # as many as those of laq
}


def mask(tokens, pins=PINS):
    return jnp.asarray(lk.pin_mask(pins, np.asarray(tokens)))


def drawn_pins(seed):
    """Single tokens of each prompt, from none to as many as the budget."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, BUDGET + 1, len(LENGTHS))
    rows = [rng.choice(n, count, replace=False) for n, count in zip(LENGTHS, counts, strict=True)]
    return [[(at, at + 1) for at in row.tolist()] for row in rows]


def read_pinned(policy, tokens, config, pinned, **options):
    return read_prompt(
        weights(config), tokens, config=config, policy=policy, budget=BUDGET, new_tokens=8,
        modules=lookahead_modules(config), pinned=pinned,
        draft=pad_drafts(policy, [[5, 6, 7]] * 3, 3), **options,
    )  # fmt: skip


ALL_PINS = (PINS, *map(drawn_pins, range(4)))


@pytest.mark.parametrize("name", OTHERS)
def test_every_policy_keeps_what_is_pinned(name):
    policy, tokens = OTHERS[name], tiny.batch(LENGTHS, PLAIN)
    for pins in ALL_PINS:
        sets = kept_sets(read_pinned(policy, tokens, PLAIN, mask(tokens, pins)).cache)
        for (_, row, _), kept in np.ndenumerate(sets):
            assert set(positions(pins[row])) <= set(kept)
        # What is pinned counts in the budget.
        sizes = np.vectorize(len)(sets)
        total = PLAIN.num_layers * PLAIN.num_kv_heads * np.minimum(LENGTHS, BUDGET)
        np.testing.assert_array_equal(sizes.sum((0, 2)), total)


def expected(policy, scores, pinned, length, window):
    """The positions that a head keeps, from its scores: pinned, then protected, then the best."""
    at = jnp.arange(length, dtype=jnp.int32)[None, None]
    lengths = jnp.asarray([length], jnp.int32)
    protected = np.asarray(policy.protected(at, lengths, BUDGET))[0, 0]
    seen = np.ones(length, bool) if window is None else length - np.arange(length) < window
    pinned = np.isin(np.arange(length), pinned)
    value = np.where(protected, 0.0, scores)  # where not all protected ones fit, the earliest do
    order = np.lexsort((np.arange(length), -value, ~protected, ~pinned, ~seen))
    return np.sort(order[: min(BUDGET, seen.sum())])


@pytest.mark.parametrize("name", RESTATED)
def test_the_rest_of_the_budget_goes_as_before(name):
    """In chunks, beside sliding windows: entries out of a window are of no use and not kept."""
    policy, tokens = make_policy(name), tiny.batch(LENGTHS, RICH)
    for pins in ALL_PINS:
        result = read(RICH, tokens, policy, budget=BUDGET, chunk=16, pinned=mask(tokens, pins))
        for (layer, row, head), kept in np.ndenumerate(kept_sets(result.cache)):
            scores = np.asarray(result.scores)[layer, row, head, : LENGTHS[row]]
            window = RICH.layer_window[layer]
            pinned = positions(pins[row])
            want = expected(policy, scores, pinned, LENGTHS[row], window)
            np.testing.assert_array_equal(kept, want)


def test_no_pins_are_no_change():
    policy, tokens = ADA_PYRAMID, tiny.batch(LENGTHS, PLAIN)
    none = jnp.zeros(tokens.shape, bool)
    pinned, plain = (read_pinned(policy, tokens, PLAIN, p).cache for p in (none, None))
    np.testing.assert_array_equal(pinned.pos, plain.pos)


jitted_raise_shares = jax.jit(raise_shares)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_raised_shares_keep_their_sum(data):
    size = data.draw(st.sampled_from([1, 2, 6]))
    shares = np.array(data.draw(st.lists(st.integers(0, 2**24), min_size=size, max_size=size)))
    least = data.draw(st.integers(0, int(shares.mean()) if shares.mean() >= 1 else 0))
    columns = jnp.asarray(shares[:, None], jnp.int32), jnp.full((1, 1), least, jnp.int32)
    raised = np.asarray(jitted_raise_shares(*columns))[:, 0]
    assert raised.sum() == shares.sum()
    assert (raised >= least).all()
    assert (raised[shares <= least] == least).all()
    if shares.min() >= least:
        assert raised.tolist() == shares.tolist()
    # In proportion: what a share has above the least is scaled by one factor, to one unit.
    over = np.maximum(shares - least, 0).astype(float)
    factor = (raised - least).sum() / max(over.sum(), 1)
    assert np.abs(raised - least - over * factor).max() <= 1 + 4e-6 * over.max()


def six_cuts(name):
    return dict(
        policy=CUTTING[name], budget=BUDGET, max_new_tokens=48, evict_every=8,
        lookahead=lookahead_modules(SHORT),
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "h2o")) for name in CUTTING]
)
def test_cuts_while_decoding_keep_what_is_pinned(name):
    """Six cuts; the row of full pins has no room for anything else after each. Drafts or not."""
    prompts, setting, caches = tiny.prompts(LENGTHS), dict(pin=PINS, **six_cuts(name)), []
    plain = _generate_with_cache(prompts, caches, **setting)
    for (_, row, _), kept in np.ndenumerate(kept_sets(caches[0])):
        assert set(PINNED[row]) <= set(kept)
        assert len(kept) < BUDGET + 8
    drafted = lk.generate(model(), prompts, drafter="prompt_lookup", draft_nodes=8, **setting)
    assert drafted.tokens == plain.tokens
    assert drafted.drafting.steps < plain.drafting.steps


def _generate_with_cache(prompts, caches, **setting):
    """`lk.generate`, which reports the cache after the prompt; this also gives the last one."""
    from lookahead_jax.decoding.drafted import Drafting

    end = Drafting.end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafting, "end", lambda self, s: (caches.append(s.cache), end(self, s)))
        return lk.generate(model(), prompts, **setting)


def test_rows_have_their_own_pins():
    prompts, setting = tiny.prompts(LENGTHS), six_cuts("h2o")
    kept = lk.generate(model(), prompts, pin=PINS, **setting).kept
    others = lk.generate(model(), prompts, pin=[[], PINS[1], [(0, 5)]], **setting).kept
    np.testing.assert_array_equal(kept[:, 1], others[:, 1])
    assert (kept[:, 0] != others[:, 0]).any()
    assert (kept[:, 2] != others[:, 2]).any()
    for layer, head in np.ndindex(kept.shape[0], kept.shape[2]):
        assert set(PINNED[1]) <= set(kept[layer, 1, head].tolist())


@pytest.mark.slow
def test_an_engine_keeps_the_pins_of_its_requests_while_decoding():
    prompts = tiny.prompts(LENGTHS)
    setting = dict(policy=CUTTING["h2o"], budget=BUDGET, evict_every=8)
    expected = lk.generate(model(), prompts, pin=PINS, max_new_tokens=40, **setting)
    engine = lk.Engine(model(), rows=2, max_new_tokens=40, max_prompt_tokens=70, **setting)
    requests = [
        lk.Request(prompt=prompt, pin=pin, max_new_tokens=40)
        for prompt, pin in zip(prompts, PINS, strict=True)
    ]
    assert [result.tokens for result in engine.run(requests)] == expected.tokens


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        ([[(0, 13), (20, 32)], []], "row 0 pins 25 tokens and the budget is 24 entries per layer"),
        ([[(0, 13), (5, 30)], []], "row 0 pins 30 tokens and the budget is 24"),
        ([[]], "pin has 1 lists of spans for 2 prompts"),
        ([[], [(0, 6)]], r"span \(0, 6\) of row 1 is not inside its prompt of 5 tokens"),
        ([[], [(3, 3)]], r"span \(3, 3\) of row 1"),
        ([[], [(-1, 3)]], r"span \(-1, 3\) of row 1"),
    ],
)
def test_pins_that_cannot_be_are_refused(pin, message):
    with pytest.raises(ValueError, match=message):
        lk.generate(model(), tiny.prompts((40, 5)), pin=pin, budget=BUDGET)


def test_the_policy_full_has_no_budget_to_exceed():
    result = lk.generate(
        model(), tiny.prompts((40, 5)), pin=[[(0, 40)], []], policy=make_policy("full"),
        budget=BUDGET, max_new_tokens=1,
    )  # fmt: skip
    assert result.cache.kept_per_head[0] == [[40, 40], [5, 5]]


def test_a_policy_that_gives_a_head_too_little_is_corrected():
    """The guarantee is the pipeline's: `head_budgets` of a policy may be anything."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class FirstHead(type(make_policy("keydiff"))):
        def head_budgets(self, ranked, candidates, layer_budget):
            share = jnp.asarray([2, 0], jnp.int32)[None] * layer_budget[:, None]
            return jnp.minimum(share, candidates)

        def max_entries(self, tokens, budget, config):
            return min(tokens, 2 * budget)

    tokens = tiny.batch(LENGTHS, PLAIN)
    sets = kept_sets(read(PLAIN, tokens, FirstHead(), budget=BUDGET, pinned=mask(tokens)).cache)
    for (_, row, _), kept in np.ndenumerate(sets):
        assert set(PINNED[row]) <= set(kept)
    # The second head of the second row takes its 5 pinned entries from the 33 of the first.
    assert np.vectorize(len)(sets)[0].tolist() == [[24, 24], [28, 5], [48, 0]]
