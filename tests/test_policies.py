"""Every policy end to end through prefill, against float64 restatements of model and score."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookahead_jax.model.context import Context
from lookahead_jax.model.decoder import Block, embed
from lookahead_jax.model.layer_attention import LayerKind
from lookahead_jax.model.params import init_params, unstack
from lookahead_jax.modules.definition import TARGETS, LookaheadConfig, init_modules, observer_block
from lookahead_jax.policies.ada import Ada
from lookahead_jax.policies.base import OnePass, Policy, WithDraft, WithModules, WithResponse
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.pyramidkv import PyramidKV
from lookahead_jax.policies.registry import POLICIES, make_policy
from lookahead_jax.policies.selection import largest_remainder, scores_by_position, select
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.policies.view import LayerView
from lookahead_jax.policies.wrapper import parts_of
from lookahead_jax.prefilling.batching import slots_for
from lookahead_jax.prefilling.prefill import compress, prefill
from lookahead_jax.prompts.read import read_prompt
from tests import reference, tiny

LENGTHS = (70, 33, 61)
BUDGET = 24
WITHIN = (24, 20)  # further rows, which the budget holds
# float32 against float64: attention logits of size 10 to 20 carry 1e-6 relative error, which
# three layers multiply. A wrong formula is off by
# more than 1e-2.
TOLERANCE = 1e-4

PLAIN = tiny.config()
# Everything that changes attention at once: windows in one layer, soft-cap, partial rotation,
# q/k norms, biases, Gemma's norms, attention sinks, a scale that is not 1 / sqrt(H).
RICH = dataclasses.replace(
    PLAIN,
    layer_window=(None, 24, None),
    ropes=(dataclasses.replace(PLAIN.ropes[0], dim=4),),
    attn_softcap=6.0,
    attn_scale=0.6,
    attn_sinks=True,
    qk_norm=True,
    qkv_bias=True,
    norm_offset=True,
    post_norms=True,
    embed_scale=2.0,
    activation="gelu_tanh",
)
MODELS = {"plain": PLAIN, "rich": RICH}


@functools.cache
def weights(model):
    """Random weights in which no norm is the identity and no bias is zero."""
    params = init_params(jax.random.key(0), model, jnp.float32)
    rng = np.random.default_rng(1)

    def shake(w):
        return w + jnp.asarray(0.1 * rng.standard_normal(w.shape), jnp.float32)

    params = jax.tree.map(shake, params)
    sharper = {"q": 2.0, "k": 2.0, "sinks": 30.0}
    layers = {name: w * sharper.get(name, 1.0) for name, w in params["layers"].items()}
    return {**params, "layers": layers}


@functools.cache
def lookahead_modules(model, seed=3):
    """Modules whose LoRA is not zero."""
    config = LookaheadConfig(tokens=4, rank=2, alpha=3.0, targets=tuple(TARGETS), init="table")
    modules = init_modules(jax.random.key(seed), config, model, params=weights(model))
    rng = np.random.default_rng(seed)
    lora = jax.tree.map(
        lambda w: jnp.asarray(0.2 * rng.standard_normal(w.shape), jnp.float32), modules.lora
    )
    return modules.replace(lora=lora)


def observer(model, tokens, modules=None):
    modules = lookahead_modules(model) if modules is None else modules
    length = (tokens >= 0).sum(1, dtype=jnp.int32)
    return observer_block(modules, length, length + 8)


def read(model, tokens, policy, budget=BUDGET, chunk=16, **options):
    if isinstance(policy.reading, WithModules):
        options.setdefault("observer", observer(model, tokens))
    slots = slots_for(policy, tokens.shape[1], budget, 8, config=model)
    return prefill(
        weights(model), tokens, config=model, policy=policy, budget=budget, slots=slots,
        new_tokens=8, chunk=chunk, with_scores=True, **options,
    )  # fmt: skip


def batch(model):
    """The rows of LENGTHS, then those of WITHIN."""
    return tiny.batch((*LENGTHS, *WITHIN), model)


@functools.cache
def read_batch(model, policy, budget=BUDGET):
    """`batch(model)` as a policy reads it: one program and one call, for several tests."""
    if isinstance(policy.reading, WithResponse):
        return read_oracle(model, batch(model), policy)
    return read(model, batch(model), policy, budget)


def response(model):
    """Rows of a response, of unequal length."""
    return tiny.batch((9, 16, 4, 6, 2), model, seed=5)


def read_oracle(model, tokens, policy, budget=BUDGET):
    full = read_batch(model, Full())
    answer = response(model)
    steps = jnp.arange(answer.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(answer >= 0, full.cache.next_pos[:, None] + steps, -1)
    params = weights(model)
    block = Block(embed(params, answer, config=model), positions, full.cache.rope_span)
    slots = slots_for(policy, full.cache.slots, budget, 8, config=model)
    cache, scores, _ = compress(
        params, full.cache, block, config=model, policy=policy, budget=budget, slots=slots,
        with_scores=True,
    )  # fmt: skip
    scores = scores_by_position(scores, full.cache.pos, tokens.shape[1])
    return full._replace(cache=cache, scores=scores)


@functools.cache
def restated(model, observers=""):
    """Layers of every row as the reference computes them."""
    tokens = np.asarray(tiny.batch(LENGTHS, model))
    answers = np.asarray(response(model))[: len(LENGTHS)]
    result = []
    for row, answer in zip(tokens, answers, strict=True):
        row = row[row >= 0]
        if observers == "lookahead":
            modules = lookahead_modules(model)
            scale = modules.config.alpha / modules.config.rank
            layers, _ = reference.run(
                weights(model), model, row, modules.embeddings, modules.lora, scale
            )
        elif observers == "response":
            layers, _ = reference.run(weights(model), model, [*row, *answer[answer >= 0]])
        else:
            layers, _ = reference.run(weights(model), model, row)
        result.append((len(row), layers))
    return result


def behind(layer, length):
    return np.arange(length, layer.probs.shape[1])


# name -> policy, its score as a function of (layer, length, config, index), last entries and
# first entries that are protected, and who observes
CASES = {
    "streaming_llm": (
        make_policy("streaming_llm"),
        lambda layer, n, c, i: np.tile(np.arange(n, dtype=float), (layer.k.shape[0], 1)),
        (0, 4), "",
    ),
    "h2o": (make_policy("h2o", window=6), lambda la, n, c, i: reference.h2o(la, n), (6, 0), ""),
    "tova": (make_policy("tova"), lambda la, n, c, i: reference.tova(la, n), (1, 0), ""),
    "snapkv": (
        make_policy("snapkv", window=8),
        lambda la, n, c, i: reference.snapkv(la, n, 8, "max", 7), (8, 0), "",
    ),
    "snapkv-kvpress": (
        make_policy("snapkv", preset="kvpress", window=8),
        lambda la, n, c, i: reference.snapkv(la, n, 8, "avg", 5), (8, 0), "",
    ),
    "snapkv-cut-window": (
        make_policy("snapkv", preset="nopool"),
        lambda la, n, c, i: reference.snapkv(la, n, 12, "none", 1), (12, 0), "",
    ),
    "rkv": (
        make_policy("rkv", window=6, kernel=3, attention=0.4),
        lambda la, n, c, i: reference.rkv(
            la, n, [np.arange(n)] * len(la.k), np.arange(n - 6, n), 6, 3, 0.4, 0.5
        ),
        (6, 0), "",
    ),
    "qfilter": (
        make_policy("qfilter"),
        lambda la, n, c, i: -np.einsum(
            "kth,kh->kt", la.k[:, :n], reference.query_filters(la.q[:, :n], len(la.k))
        ),
        (0, 0), "",
    ),
    "triattention": (
        make_policy("triattention", window=6, reach=40),
        lambda la, n, c, i: reference.triattention(
            la, n, c, i, reference.query_centre([{i: la}], c, i), 40
        ),
        (6, 0), "",
    ),
    "keydiff": (make_policy("keydiff"), lambda la, n, c, i: reference.keydiff(la, n), (0, 0), ""),
    "expected_attention": (
        make_policy("expected_attention"),
        lambda la, n, c, i: reference.expected_attention(la, n, c, i, 4, 512, 0.0), (0, 4), "",
    ),
    "expected_attention-epsilon": (
        make_policy("expected_attention", epsilon=0.02, future=40, sinks=2),
        lambda la, n, c, i: reference.expected_attention(la, n, c, i, 2, 40, 0.02), (0, 2), "",
    ),
    "lookaheadkv": (
        make_policy("lookaheadkv"),
        lambda la, n, c, i: reference.observed(la, n, behind(la, n), n, "none", 1),
        (0, 0), "lookahead",
    ),
    "lookaheadkv-pooled": (
        make_policy("lookaheadkv", pool="max", kernel=5, window=3),
        lambda la, n, c, i: reference.observed(la, n, behind(la, n), n, "max", 5),
        (3, 0), "lookahead",
    ),
    "lookaheadkv-largest": (
        make_policy("lookaheadkv", reduce="max", group="max", pool="avg", kernel=3),
        lambda la, n, c, i: reference.observed(la, n, behind(la, n), n, "avg", 3, np.max, np.max),
        (0, 0), "lookahead",
    ),
    "oracle": (
        make_policy("oracle"),
        lambda la, n, c, i: reference.observed(la, n, behind(la, n), n, "none", 1),
        (0, 0), "response",
    ),
}  # fmt: skip


def kept_sets(cache):
    """Positions per layer, row and head; checks that they ascend and match the cache's lengths."""
    pos, length = np.asarray(cache.pos), np.asarray(cache.length)
    sets = np.empty(length.shape, object)
    for at in np.ndindex(length.shape):
        kept = pos[at][: length[at]]
        assert (np.diff(kept) > 0).all()
        assert (kept >= 0).all()
        assert (pos[at][length[at] :] == -1).all()
        sets[at] = kept
    return sets


def check_selection(kept, scores, pinned, allowed, tolerance):
    """`kept` are the best of `scores` [T] among the allowed, pinned first, up to near-ties."""
    ranked = np.where(pinned & allowed, np.inf, np.where(allowed, scores, -np.inf))
    assert allowed[kept].all()
    assert set(np.flatnonzero(pinned & allowed)) <= set(kept) or np.isinf(ranked[kept]).all()
    if 0 < len(kept) < len(scores):
        border = np.sort(ranked)[::-1][len(kept) - 1]
        assert (ranked[kept] >= border - tolerance).all()
        left = np.setdiff1d(np.arange(len(scores)), kept)
        assert (ranked[left] <= border + tolerance).all()


def protect(model, index, length, last, first):
    position = np.arange(length)
    window = model.layer_window[index]
    allowed = position >= 0 if window is None else length - position < window
    return (position >= length - last) | (position < first), allowed


def check_heads(scores, sets, expected, pinned, allowed):
    """Scores and kept entries of every head of one layer and row are the `expected` ones."""
    for score, kept, wanted in zip(scores, sets, expected, strict=True):
        tolerance = TOLERANCE * np.abs(wanted).max()
        np.testing.assert_allclose(score[: len(wanted)], wanted, rtol=0, atol=tolerance)
        assert len(kept) == min(BUDGET, allowed.sum())
        check_selection(kept, wanted, pinned, allowed, tolerance)


# Other settings of a policy, and scores that no model enters, take one model.
RICH_ALONE = (
    "streaming_llm", "snapkv-kvpress", "snapkv-cut-window", "expected_attention-epsilon",
    "lookaheadkv-pooled", "lookaheadkv-largest",
)  # fmt: skip


@pytest.mark.parametrize(
    ("case", "model_name"),
    [(c, m) for c in CASES for m in MODELS if m == "rich" or c not in RICH_ALONE],
)
def test_scores_and_kept_entries(case, model_name):
    check_case(case, MODELS[model_name])


def check_case(case, model):
    """Scores and kept entries of a policy are those of the reference."""
    policy, score, (last, first), observers = CASES[case]
    result = read_batch(model, policy)
    sets, scores = kept_sets(result.cache), np.asarray(result.scores)
    for row, (length, layers) in enumerate(restated(model, observers)):
        for index, layer in enumerate(layers):
            expected = score(layer, length, model, index)
            pinned, allowed = protect(model, index, length, last, first)
            check_heads(scores[index, row], sets[index, row], expected, pinned, allowed)


@pytest.mark.parametrize("case", ["keydiff", "snapkv"])
def test_kept_rows_are_the_keys_and_values_of_their_positions(case):
    result = read_batch(RICH, CASES[case][0])
    for row, (_, layers) in enumerate(restated(RICH)):
        for index, layer in enumerate(layers):
            for head, kept in enumerate(kept_sets(result.cache)[index, row]):
                for name in ("k", "v"):
                    expected = getattr(layer, name)[head, kept]
                    stored = np.asarray(getattr(result.cache, name))[index, row, head, : len(kept)]
                    np.testing.assert_allclose(
                        stored, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max()
                    )


def test_random_depends_on_seed_layer_head_and_position_alone():
    result = read_batch(RICH, make_policy("random", seed=5))
    scores = np.asarray(result.scores)[:, : len(LENGTHS)]
    for layer, head, position in [(0, 0, 0), (1, 1, 32), (2, 0, 17)]:
        key = jax.random.key(5)
        for number in (layer, head, position):
            key = jax.random.fold_in(key, number)
        assert (scores[layer, :, head, position] == float(jax.random.uniform(key))).all()
    distinct = scores[:, 0, :, :70].reshape(-1)
    assert len(np.unique(distinct)) == distinct.size  # no layer or head repeats another
    assert abs(distinct.mean() - 0.5) < 0.05
    assert 0 <= distinct.min() < 0.02
    assert 0.98 < distinct.max() < 1
    heads = jnp.zeros((1, RICH.num_kv_heads, 70), jnp.float32)
    view = fake_view(heads, jnp.arange(70, dtype=jnp.int32)[None, None], jnp.asarray([70]))
    same, other = (  # of the first layer
        np.asarray(jax.jit(lambda seed=seed: make_policy("random", seed=seed).score(view))())
        for seed in (5 + 2**64, 6)
    )
    np.testing.assert_array_equal(same[0], scores[0, 0, :, :70])
    assert (other[0] != scores[0, 0, :, :70]).all()


PYRAMID = make_policy("pyramidkv", window=8, pool="none")


@pytest.mark.parametrize(("model_name", "budget"), [("plain", 1), ("rich", 24), ("plain", 40)])
def test_pyramid_budgets_end_to_end(model_name, budget):
    model, policy = MODELS[model_name], PYRAMID
    sets = kept_sets(read_batch(model, policy, budget).cache)
    window = policy.window_rows(budget)
    for row, (length, layers) in enumerate(restated(model)):
        budgets = reference.pyramid(length, budget, window, len(layers), 20)
        assert sum(budgets) == len(layers) * min(budget, length)
        for index, layer in enumerate(layers):
            scores = reference.snapkv(layer, length, window, "none", 1)
            pinned, allowed = protect(model, index, length, window, 0)
            for head, kept in enumerate(sets[index, row]):
                assert len(kept) == min(budgets[index], allowed.sum())
                tolerance = TOLERANCE * scores[head].max()
                check_selection(kept, scores[head], pinned, allowed, tolerance)


ADA = {
    "snapkv": make_policy("ada", inner="snapkv", alpha=0.2, window=8, pool="avg", kernel=3),
    "keydiff": make_policy("ada", inner="keydiff", alpha=0.0),
    "lookaheadkv": make_policy("ada", inner="lookaheadkv", alpha=0.5),
}


@pytest.mark.parametrize("inner", ADA)
def test_ada_budgets_end_to_end(inner):
    policy = ADA[inner]
    scorers = {
        "snapkv": lambda la, n: reference.snapkv(la, n, 8, "avg", 3),
        "keydiff": reference.keydiff,
        "lookaheadkv": lambda la, n: reference.observed(la, n, behind(la, n), n, "none", 1),
    }
    sets = kept_sets(read_batch(PLAIN, policy).cache)
    uneven = 0
    rows = restated(PLAIN, "lookahead" if inner == "lookaheadkv" else "")
    for row, (length, layers) in enumerate(rows):
        for index, layer in enumerate(layers):
            scores = scorers[inner](layer, length)
            pinned, allowed = protect(PLAIN, index, length, 8 if inner == "snapkv" else 0, 0)
            budgets = reference.ada(np.where(pinned, np.inf, scores), BUDGET, policy.alpha)
            assert [len(kept) for kept in sets[index, row]] == budgets
            assert sum(budgets) == BUDGET * len(budgets)
            uneven += len(set(budgets)) > 1
            for head, kept in enumerate(sets[index, row]):
                tolerance = TOLERANCE * np.abs(scores[head]).max()
                check_selection(kept, scores[head], pinned, allowed, tolerance)
    assert uneven > 0


ADA_PYRAMID = Ada(inner=PyramidKV(window=4), alpha=0.2)


def test_ada_over_pyramid_keeps_both_totals():
    per_layer = np.asarray(read_batch(RICH, ADA_PYRAMID).cache.length).sum(2)
    for row, length in enumerate(LENGTHS):
        budgets = reference.pyramid(length, BUDGET, 4, 3, 20)
        # The next token sees one entry less than the window of the middle layer.
        seen = [min(b, w - 1) if w else b for b, w in zip(budgets, RICH.layer_window, strict=True)]
        assert per_layer[:, row].tolist() == [RICH.num_kv_heads * n for n in seen]


def on_its_own(name):
    """Policies that need neither a second pass nor a draft (test_laq.py, test_baselines.py)."""
    return isinstance(make_policy(name).reading, (OnePass, WithModules))


NESTED = make_policy("critical:chunkkv:layers:threshold:snapkv")
MADE = {
    **{
        name: make_policy(name)
        for name, kind in POLICIES.items()
        if name not in tiny.NEEDS_SETTINGS
        and on_its_own(name)
        and not any(type(part) is kind for part in parts_of(NESTED))
    },
    **{name: case[0] for name, case in CASES.items() if name != "oracle"},
    "nested": NESTED,
    "pyramidkv": PYRAMID,
    "ada": make_policy("ada", inner="expected_attention"),
    "ada-pyramid": ADA_PYRAMID,
    "random": make_policy("random", seed=5),
}


@pytest.mark.parametrize("name", sorted(MADE))
def test_rows_within_the_budget_lose_nothing(name):
    sets = kept_sets(read_batch(RICH, MADE[name]).cache)
    for row, length in enumerate(WITHIN, start=len(LENGTHS)):
        for index in range(RICH.num_layers):
            _, allowed = protect(RICH, index, length, 0, 0)
            for kept in sets[index, row]:
                np.testing.assert_array_equal(kept, np.flatnonzero(allowed))


def check_same_row(name, other, row):
    """The second row of `batch` is row number `row` of what `other` holds."""
    together = read_batch(RICH, MADE[name])
    scores = np.asarray(together.scores)[:, 1, :, :33]
    error = np.abs(scores - np.asarray(other.scores)[:, row, :, :33])
    # The same float32 sums in other groups of terms; knorm rounds them to 14 bits.
    bound = 2.0**-14 if name == "knorm" else 1e-5
    assert (error <= bound * np.abs(scores).max(-1, keepdims=True)).all()
    if name in ("random", "streaming_llm"):
        assert not error.any()
    for mine, same in zip(
        kept_sets(together.cache)[:, 1].flat, kept_sets(other.cache)[:, row].flat, strict=True
    ):
        np.testing.assert_array_equal(mine, same)


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_row_does_not_depend_on_its_neighbours(name):
    others = tiny.batch((9, 70, 33, 1, 55), RICH, seed=8)
    rows = others.at[2].set(batch(RICH)[1])
    check_same_row(name, read(RICH, rows, MADE[name]), 2)


# The restatements above read each row by itself, without padding. Here are policies without one,
# and one for every kind of observer.
PADDED = ("random", "pyramidkv", "knorm", "lagkv", "nested", "ada-pyramid")
PADDED += ("snapkv-kvpress", "h2o", "lookaheadkv-pooled")


@pytest.mark.parametrize("name", PADDED)
def test_a_row_alone_is_the_row_in_a_batch(name):
    check_same_row(name, read(RICH, batch(RICH)[1:2, :33], MADE[name]), 0)  # another padding


@pytest.mark.parametrize("name", ["ada", "lookaheadkv"])
def test_unstacked_layers_keep_the_same(name):
    """With statistics and shares of heads; with an observer and its LoRA."""
    tokens = batch(RICH)
    policy, params = MADE[name], unstack(weights(RICH))
    slots = slots_for(policy, tokens.shape[1], BUDGET, 8, config=RICH)
    unrolled = prefill(
        params, tokens, config=RICH, policy=policy, budget=BUDGET, slots=slots, new_tokens=8,
        chunk=16, observer=observer(RICH, tokens) if name == "lookaheadkv" else None,
    )  # fmt: skip
    np.testing.assert_array_equal(unrolled.cache.pos, read_batch(RICH, policy).cache.pos)


@pytest.mark.parametrize(
    ("model_name", "case"), [("plain", "lookaheadkv"), ("rich", "lookaheadkv-pooled")]
)
def test_compress_keeps_what_prefill_keeps(model_name, case):
    model, policy = MODELS[model_name], CASES[case][0]
    tokens = batch(model)
    one_pass, full = read_batch(model, policy), read_batch(model, Full())
    slots = slots_for(policy, full.cache.slots, BUDGET, 8, config=model)
    cache, scores, _ = compress(
        weights(model), full.cache, observer(model, tokens), config=model, policy=policy,
        budget=BUDGET, slots=slots, with_scores=True,
    )  # fmt: skip
    for mine, other in zip(kept_sets(cache).flat, kept_sets(one_pass.cache).flat, strict=True):
        np.testing.assert_array_equal(mine, other)
    # What a sliding window has left behind is in no slot: compared where the cache holds entries.
    pos = np.asarray(full.cache.pos)
    expected = np.take_along_axis(np.asarray(one_pass.scores), np.clip(pos, 0, 127), axis=-1)
    # The same float32 sums over another number of slots.
    largest = expected.max(-1, keepdims=True)
    assert (np.abs(np.asarray(scores) - expected) <= 1e-5 * largest)[pos >= 0].all()


def test_two_passes_report_scores_by_position():
    """With a sliding window, and with a budget that exceeds the prompt."""
    tokens = tiny.batch((40, 33), RICH)
    result = read_prompt(
        weights(RICH), tokens, config=RICH, policy=make_policy("oracle", response_tokens=5),
        budget=200, new_tokens=0, with_scores=True,
    )  # fmt: skip
    scores = np.asarray(result.scores)
    assert scores.shape == (3, 2, RICH.num_kv_heads, tokens.shape[1])
    for at, kept in np.ndenumerate(kept_sets(result.cache)):
        first = 0 if RICH.layer_window[at[0]] is None else (40, 33)[at[1]] - 23
        np.testing.assert_array_equal(kept, np.arange(first, (40, 33)[at[1]]))
        np.testing.assert_array_equal(np.flatnonzero(scores[at]), kept)


def test_compress_of_a_cut_cache_chooses_among_what_is_left():
    policy = make_policy("ada", inner="lookaheadkv", pool="max", kernel=3)
    first = read_batch(PLAIN, ADA["lookaheadkv"])
    cache, scores, _ = compress(
        weights(PLAIN), first.cache, observer(PLAIN, batch(PLAIN)), config=PLAIN, policy=policy,
        budget=10, slots=128, with_scores=True,
    )  # fmt: skip
    before, after = kept_sets(first.cache), kept_sets(cache)
    assert all(set(b) >= set(a) for b, a in zip(before.flat, after.flat, strict=True))
    assert (np.asarray(cache.length).sum(2) == 10 * PLAIN.num_kv_heads).all()
    assert np.isfinite(np.asarray(scores)).all()
    empty = np.asarray(first.cache.pos) < 0
    assert (np.asarray(scores)[empty] == 0).all()
    assert (np.asarray(scores)[~empty] > 0).all()


def fake_view(scores, pos, length, window=None):
    """A layer of which only the shape of the keys and the positions matter."""
    k = jnp.zeros((*scores.shape, 2), jnp.float32)
    window = None if window is None else jnp.asarray(window, jnp.int32)
    zero = jnp.asarray(0, jnp.int32)
    kind = LayerKind(zero, window, zero)
    return LayerView.of(Context(k, k, pos), kind, length=length, span=length, config=PLAIN)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pins(Policy):
    """Protects the last `last` entries."""

    last: int

    def protected(self, pos, length, budget):
        return pos >= length[:, None, None] - self.last


LIMIT, WIDTH = 12, 20


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_select_properties(data):
    """Ascending, distinct, allowed, protected first, the best of the rest, the exact number."""
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    lengths = np.array(data.draw(st.lists(st.integers(1, WIDTH), min_size=2, max_size=2)), np.int32)
    budgets = np.array(data.draw(st.lists(st.integers(0, LIMIT), min_size=2, max_size=2)), np.int32)
    window = data.draw(st.sampled_from([None, 1, 2, 7, 30]))
    last = data.draw(st.integers(0, 3))
    levels = data.draw(st.sampled_from([2, 1000]))  # few levels: many ties
    scores = rng.integers(0, levels, (2, 3, WIDTH)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    steps = np.arange(WIDTH, dtype=np.int32)[None]
    pos = np.where(steps < lengths[:, None], steps, -1)[:, None]
    kept = select(
        Pins(last=last),
        fake_view(jnp.asarray(scores), jnp.asarray(pos), jnp.asarray(lengths), window),
        jnp.asarray(scores), budget=5, layer_budget=jnp.asarray(budgets), limit=LIMIT,
    )  # fmt: skip
    for row in range(2):
        allowed = (pos[row, 0] >= 0) & (lengths[row] - pos[row, 0] < (window or 10**6))
        pinned = pos[row, 0] >= lengths[row] - last
        for head in range(3):
            count = int(kept.length[row, head])
            positions = np.asarray(kept.pos)[row, head]
            assert count == min(budgets[row], allowed.sum())
            assert (np.diff(positions[:count]) > 0).all()
            assert (positions[count:] == -1).all()
            np.testing.assert_array_equal(kept.index[row, head, :count], positions[:count])
            finite = np.maximum(scores[row, head], -1e30)
            check_selection(positions[:count], finite, pinned, allowed, 0.0)


SHARES = 12
jitted_largest_remainder = jax.jit(largest_remainder)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 9), st.integers(0, 40)),
        min_size=1, max_size=SHARES,
    ),
    st.floats(0, 1),
)  # fmt: skip
def test_the_largest_remainder_reaches_every_total_within_the_room(shares, where):
    """Shares of nothing, without room, fill up the arrays: one program for every number."""
    columns = np.zeros((3, SHARES, 1), np.int32)
    columns[:, : len(shares), 0] = np.array(shares).T
    base, _, room = columns
    total = int(base.sum() + round(where * room.sum()))
    result = np.asarray(
        jitted_largest_remainder(*map(jnp.asarray, columns), jnp.asarray([total], jnp.int32))
    )
    assert result.sum() == total
    assert (result >= base).all()
    assert (result <= base + room).all()
    raised = (result - base)[:, 0]
    if raised.max() <= 1:  # plain largest remainder: nobody raised before a larger remainder
        order = sorted(range(len(shares)), key=lambda i: (-shares[i][1], i))
        order = [i for i in order if shares[i][2] > 0]
        assert set(np.flatnonzero(raised)) == set(order[: raised.sum()])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 35]), st.integers(1, 300), st.integers(1, 64), st.integers(1, 30),
    st.lists(st.integers(1, 700), min_size=3, max_size=3),
)  # fmt: skip
def test_pyramid_allocation(layers, budget, window, beta, lengths):
    policy = PyramidKV(window=window, beta=beta)
    model = dataclasses.replace(
        PLAIN, num_layers=layers, layer_rope=(0,) * layers, layer_window=(None,) * layers
    )
    budgets = np.asarray(policy.layer_budgets(jnp.asarray(lengths, jnp.int32), budget, model))
    assert budgets.max() <= policy.max_entries(max(lengths), budget, model)
    for row, length in enumerate(lengths):
        rows = policy.window_rows(budget)
        assert budgets[:, row].tolist() == reference.pyramid(length, budget, rows, layers, beta)
        assert budgets[:, row].sum() == layers * min(budget, length)
        assert budgets[:, row].max() <= length
        assert (np.diff(budgets[:, row]) <= 1).all()  # falling, up to the rounding


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_ada_allocation(data):
    """Exactly the reference where heads are equally full; exact totals and bounds anywhere."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    thousandths = data.draw(st.sampled_from([0, 1000]) | st.integers(0, 1000))
    policy = Ada(inner=make_policy("keydiff"), alpha=thousandths / 1000)
    budget = data.draw(st.integers(1, WIDTH))
    equal = data.draw(st.booleans())
    filled = np.full(3, WIDTH) if equal else rng.integers(0, WIDTH + 1, 3)
    scores = (rng.random((3, WIDTH)) * rng.random((3, 1))).astype(np.float32)
    ranked = np.where(np.arange(WIDTH)[None] < filled[:, None], scores, -np.inf)
    budgets = np.asarray(
        policy.head_budgets(
            jnp.asarray(ranked, jnp.float32)[None],
            jnp.asarray(filled, jnp.int32)[None],
            jnp.asarray([budget], jnp.int32),
        )
    )[0]
    assert budgets.sum() == min(3 * budget, filled.sum())
    assert (budgets <= filled).all()
    assert (budgets >= np.minimum(thousandths * budget // 1000, filled)).all()
    if equal:
        assert budgets.tolist() == reference.ada(ranked, budget, thousandths / 1000)
        model = dataclasses.replace(PLAIN, num_heads=3, num_kv_heads=3)
        assert budgets.max() <= policy.max_entries(WIDTH, budget, model)


def test_make_policy_reads_text_and_values():
    assert make_policy("snapkv") == SnapKV(window=32, pool="max", kernel=7)
    assert make_policy("snapkv", window="16", pool="NONE") == SnapKV(window=16, pool="none")
    assert make_policy("snapkv", pool=None) == SnapKV(pool="none")
    kvpress = make_policy("snapkv", preset="kvpress", window="16")
    assert kvpress == SnapKV(window=16, pool="avg", kernel=5)
    assert make_policy("pyramidkv", preset="nopool", beta="10").beta == 10
    ada = make_policy("ada", inner="h2o", alpha="0.5", window="3")
    assert ada == Ada(inner=make_policy("h2o", window=3), alpha=0.5)
    assert make_policy("ada", inner="lookaheadkv").reading == WithModules()
    wrapped = make_policy("ada", inner="oracle", response_tokens=7)
    assert wrapped.reading == WithResponse(tokens=7)
    assert make_policy("ada", inner="speckv", draft_tokens="9").reading == WithDraft(tokens=9)
    assert make_policy("ada", inner="kvzip", allocate="layer").reading.across_layers is False


@pytest.mark.parametrize(
    ("name", "arguments", "listed"),
    [
        ("snapvk", {}, "pyramidkv"),
        ("snapkv", dict(windows=3), "preset, window, pool, kernel"),
        ("snapkv", dict(pool="median"), "max, avg, none"),
        ("snapkv", dict(window="wide"), "an integer"),
        ("snapkv", dict(window=0), "at least 1"),
        ("snapkv", dict(window=1.5), "an integer"),
        ("snapkv", dict(kernel=4), "odd"),
        ("snapkv", dict(preset="paper"), "factory, kvpress, nopool"),
        ("tova", dict(window=3), "takes none"),
        ("ada", dict(inner="snapvk"), "snapkv, rkv, pyramidkv"),
        ("ada", dict(inner="ada"), "cannot wrap Ada: it shares budgets among heads itself"),
        ("ada", dict(inner="full"), "cannot wrap Full: it keeps everything"),
        ("ada", dict(inner="kvzip"), "cannot wrap KVzip: .* set allocate=layer"),
        ("ada", dict(inner=make_policy("kvzip")), "cannot wrap KVzip"),
        ("ada", dict(alpha="2"), "between 0 and 1"),
        ("ada", dict(alpha="nan"), "between 0 and 1"),
        ("ada", dict(inner="h2o", pool="max"), "window"),
        ("expected_attention", dict(epsilon="nan"), "epsilon"),
    ],
)
def test_make_policy_says_what_is_possible(name, arguments, listed):
    with pytest.raises(ValueError, match=listed) as error:
        make_policy(name, **arguments)
    assert "\n" not in str(error.value)


def test_a_window_beyond_the_budget_is_reduced_with_a_notice():
    policy = make_policy("ada", inner="snapkv", window=32)
    assert (policy.window_rows(64), policy.notice(64)) == (32, None)
    assert policy.window_rows(32) == 16
    assert policy.notice(32) == "window 32 exceeds budget 32; reduced to 16"
    assert make_policy("snapkv").window_rows(1) == 1
    assert make_policy("tova").notice(1) is None
