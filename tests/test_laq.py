"""LAQ and LAQ++ from the prompt to the cut cache, against a float64 restatement of all passes."""

import functools

import numpy as np
import pytest

from lookahead_jax.generation import read_prompt
from lookahead_jax.policies import make_policy
from tests import reference, tiny
from tests.test_policies import (
    BUDGET,
    LENGTHS,
    MODELS,
    PLAIN,
    TOLERANCE,
    check_selection,
    kept_sets,
    protect,
    weights,
)

DRAFT = dict(draft_tokens=6, draft_window=8, draft_pool="avg", draft_kernel=3)
LAQ = make_policy("laq", **DRAFT, pool="max", kernel=5)
LAQ2 = make_policy("laq++", **DRAFT, pool="avg", kernel=3, window=5)


@functools.cache
def drafted(model_name, row, eos=()):
    """A prompt, and the tokens decoded on a copy of its cache that SnapKV has cut."""
    model = MODELS[model_name]
    tokens = np.asarray(tiny.batch(LENGTHS, model))[row]
    tokens = tokens[tokens >= 0]
    layers, _ = reference.run(weights(model), model, tokens)
    kept = []
    for window, layer in zip(model.layer_window, layers, strict=True):
        scores = reference.snapkv(layer, len(tokens), 8, "avg", 3)
        scores[:, -8:] = np.inf
        first = 0 if window is None else len(tokens) - window + 1
        kept.append([reference.best(head, BUDGET, first) for head in scores])
    return tokens, reference.greedy_draft(weights(model), model, tokens, kept, 6, eos)


def read(model, policy, eos=(), rows=slice(None), budget=BUDGET):
    return read_prompt(
        weights(model), tiny.batch(LENGTHS, model)[rows], config=model, policy=policy,
        budget=budget, new_tokens=8, eos_ids=eos, with_scores=True,
    )  # fmt: skip


def check(result, model_name, policy, kind, kernel, eos=()):
    """Scores and kept entries are those of the draft's queries over the whole prompt."""
    model = MODELS[model_name]
    sets, scores = kept_sets(result.cache), np.asarray(result.scores)
    for row, length in enumerate(LENGTHS):
        tokens, draft = drafted(model_name, row, eos)
        layers, _ = reference.run(weights(model), model, [*tokens, *draft])
        observers = np.arange(length - policy.window, length + len(draft))
        for index, layer in enumerate(layers):
            scored = length - policy.window
            expected = reference.observed(layer, length, observers, scored, kind, kernel)
            pinned, allowed = protect(model, index, length, policy.window, 0)
            for head in range(model.num_kv_heads):
                tolerance = TOLERANCE * expected[head].max()
                np.testing.assert_allclose(
                    scores[index, row, head, :length], expected[head], rtol=0, atol=tolerance
                )
                kept = sets[index, row, head]
                assert len(kept) == min(BUDGET, allowed.sum())
                check_selection(kept, expected[head], pinned, allowed, tolerance)


@pytest.mark.parametrize("model_name", MODELS)
def test_laq(model_name):
    check(read(MODELS[model_name], LAQ), model_name, LAQ, "max", 5)


@pytest.mark.parametrize("model_name", MODELS)
def test_laq_plus_plus_observes_with_the_last_prompt_queries_and_keeps_them(model_name):
    check(read(MODELS[model_name], LAQ2), model_name, LAQ2, "avg", 3)


def test_the_draft_ends_with_its_first_end_of_sequence():
    _, draft = drafted("plain", 0)
    eos = (draft[2],)
    cut = [len(drafted("plain", row, eos)[1]) for row in range(len(LENGTHS))]
    assert cut[0] <= 3
    assert max(cut) == 6  # another row goes on
    check(read(PLAIN, LAQ, eos), "plain", LAQ, "max", 5, eos)


def test_a_draft_on_the_whole_prompt_is_the_oracle():
    """With room for everything, LAQ without pooling reads the oracle's response."""
    budget = max(LENGTHS)
    laq = make_policy("laq", draft_tokens=6, pool="none")
    oracle = make_policy("oracle", response_tokens=6)
    expected = np.asarray(read(PLAIN, oracle, budget=budget).scores)
    np.testing.assert_allclose(read(PLAIN, laq, budget=budget).scores, expected, rtol=1e-4)


def test_a_row_alone_is_the_row_in_a_batch_also_inside_ada():
    """Another batch groups float32 sums differently."""
    policy = make_policy("ada", inner="laq++", **DRAFT, pool="none", window=5)
    together, alone = read(PLAIN, policy), read(PLAIN, policy, rows=slice(1, 2))
    expected = np.asarray(together.scores)[:, 1:2]
    np.testing.assert_allclose(alone.scores, expected, rtol=0, atol=1e-5 * expected.max())
    assert (np.asarray(alone.cache.length).sum(2) == BUDGET * PLAIN.num_kv_heads).all()
    for mine, other in zip(
        kept_sets(together.cache)[:, 1].flat, kept_sets(alone.cache)[:, 0].flat, strict=True
    ):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("budget", [1, 2, 8])
def test_small_budgets(budget):
    for name in ("laq", "laq++"):
        result = read(PLAIN, make_policy(name, **DRAFT), budget=budget)
        assert (np.asarray(result.cache.length) == budget).all()
        assert np.isfinite(np.asarray(result.scores)).all()


@pytest.mark.parametrize(
    ("fields", "listed"),
    [
        (dict(draft_tokens=0), "draft_tokens=0"),
        (dict(window=-1), "window=-1"),
        (dict(kernel=4), "odd"),
        (dict(draft_kernel=4), "the draft's kernel=4 must be odd"),
        (dict(draft_window=0), "the draft's window=0"),
    ],
)
def test_impossible_fields(fields, listed):
    with pytest.raises(ValueError, match=listed):
        make_policy("laq", **fields)


def test_a_cut_draft_window_is_said():
    policy = make_policy("ada", inner="laq++")
    assert policy.notice(64) is None
    assert "a window of 32 would eat the budget of 32; it is cut to 16" in (policy.notice(32) or "")
    assert policy.window_rows(8) == 4
