"""Whole prompts, read once: what policies keep of them is what they keep when they read alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.modules.definition import LookaheadConfig, init_modules
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.prompts.read import read_prompt
from lookahead_jax.prompts.whole import alike, cut_whole, read_whole, scores_of
from tests import tiny

MODEL = tiny.config()
SIZES = LookaheadConfig(tokens=3, rank=2, alpha=4.0, targets=("q", "up"), init="normal")
LENGTHS = (61, 40)
BUDGETS = 12, 24
PINS = [[(3, 9)], [(0, 2), (20, 23)]]
POLICIES = {
    "the window observes": make_policy("snapkv", window=8),
    "shares of heads": make_policy("critical:ada:snapkv", window=4),
    "statistics over all tokens": make_policy("h2o", window=4),
    "entries alone": make_policy("keydiff"),
    "modules": make_policy("lookaheadkv"),
    "a draft that is looked up": make_policy("laq", draft="prompt"),
    "a draft on a cut copy": make_policy("laq", draft_tokens=4, draft_window=4),
    "a replay, all layers together": make_policy("kvzip", chunk=16),
}


@pytest.fixture(scope="module")
def whole():
    tokens = tiny.batch(LENGTHS, MODEL)
    return read_whole(tiny.params(MODEL), tokens, config=MODEL, room=8)


def entries(cache):
    """The kept positions of every layer, row and head."""
    pos = np.asarray(cache.pos)
    return [sorted(row[row >= 0]) for row in pos.reshape(-1, pos.shape[-1])]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_cuts_of_a_whole_prompt_are_those_of_its_own_reading(policy, whole):
    params = tiny.params(MODEL)
    modules = init_modules(jax.random.key(0), SIZES, MODEL)
    pinned = jnp.asarray(lk.pin_mask(PINS, np.asarray(whole.tokens)))
    groups = {b: group[0] for group in alike(policy, BUDGETS, whole.tokens) for b in group}
    assert set(groups) == set(BUDGETS)
    for budget, marks in zip(BUDGETS, (None, pinned), strict=True):
        alone = read_prompt(
            params, whole.tokens, config=MODEL, policy=policy, budget=budget, new_tokens=4,
            modules=modules, pinned=marks,
        )  # fmt: skip
        scores = scores_of(
            params, whole, policy, config=MODEL, budget=groups[budget], modules=modules,
            pinned=marks,
        )  # fmt: skip
        cut = cut_whole(
            params, whole, scores, config=MODEL, policy=policy, budget=budget, room=4, pinned=marks
        )
        assert entries(cut) == entries(alone.cache)
        np.testing.assert_allclose(whole.logits, alone.logits, atol=1e-5)
        asked = tiny.batch((4, 4), MODEL, seed=1)
        after = [lk.extend(params, asked, c, config=MODEL)[1] for c in (cut, alone.cache)]
        np.testing.assert_allclose(*after, atol=1e-5)


def test_a_policy_that_cuts_while_it_reads_scores_no_whole_prompt(whole):
    policy = make_policy("incremental:keydiff", every=32)
    with pytest.raises(ValueError, match="Incremental cuts a prompt while it is read"):
        scores_of(tiny.params(MODEL), whole, policy, config=MODEL, budget=12)
