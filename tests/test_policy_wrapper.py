"""A wrapped policy is asked everything its wrapper does not decide: by name, and end to end."""

import inspect
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.decoding.eviction import DecodeEviction
from lookahead_jax.model.cache import empty_cache
from lookahead_jax.policies.ada import Ada
from lookahead_jax.policies.base import CutByTokens, Policy, WithDraft
from lookahead_jax.policies.registry import POLICIES, make_policy
from lookahead_jax.policies.view import Chunk
from lookahead_jax.policies.wrapper import PolicyWrapper
from lookahead_jax.prompts.read import read_prompt
from tests import tiny
from tests.test_baselines import DRAFTS
from tests.test_policies import BUDGET, LENGTHS, PLAIN, RICH, fake_view, kept_sets, weights

ARRAY = jnp.arange(3, dtype=jnp.int32)
VIEW = fake_view(jnp.zeros((1, 1, 3)), ARRAY[None, None], ARRAY[:1])
CACHE = empty_cache(PLAIN, 1, 1, jnp.float32, ARRAY[:1])
# One answer for everything a policy is asked, of the right type and unlike the base class's.
ANSWERS = {
    "reading": WithDraft(tokens=77),
    "decode_cut": CutByTokens(adds_up=False),
    "notice": "careful",
    "window_rows": 77,
    "init_stats": "empty",
    "accumulate": "more",
    "score": ARRAY + 1,
    "adjust": ARRAY + 6,
    "protected": ARRAY + 2,
    "candidates": ARRAY + 3,
    "layer_budgets": ARRAY + 4,
    "head_budgets": ARRAY + 5,
    "rerank": ARRAY + 7,
    "max_entries": 78,
    "renumbers": True,
    "arrange": CACHE.fork(1),
}
ARGUMENTS = {
    "batch": 2, "tokens": 5, "budget": 3, "config": PLAIN, "stats": "some", "view": VIEW,
    "chunk": Chunk(*[ARRAY] * 8, PLAIN, ARRAY, ARRAY), "pos": ARRAY, "length": ARRAY,
    "window": None,
    "ranked": ARRAY, "candidates": ARRAY, "layer_budget": ARRAY, "scores": ARRAY,
    "competing": ARRAY, "budgets": ARRAY, "cache": CACHE,
}  # fmt: skip


def answering(name: str) -> Any:
    """A member of `Policy` that gives its answer, and checks what it is given."""
    if isinstance(vars(Policy)[name], property):
        return property(lambda self: ANSWERS[name])

    def answer(self, *given):
        assert all(a is b for a, b in zip(given, arguments(name), strict=True))
        return ANSWERS[name]

    return answer


def arguments(name: str) -> list[Any]:
    return [ARGUMENTS[p] for p in inspect.signature(vars(Policy)[name]).parameters if p != "self"]


ASKED = [name for name in vars(Policy) if not name.startswith("_") and name != "presets"]
Answering: Any = type("Answering", (Policy,), {name: answering(name) for name in ASKED})


@pytest.mark.parametrize("name", ASKED)
def test_a_wrapper_passes_every_question_on(name):
    wrapper = PolicyWrapper(inner=Answering())
    answer = getattr(wrapper, name)
    if callable(answer):
        answer = answer(*arguments(name))
    assert answer is ANSWERS[name] or answer == ANSWERS[name]


def read(policy, **options):
    return read_prompt(
        weights(RICH), tiny.batch(LENGTHS, RICH), config=RICH, policy=policy, budget=BUDGET,
        new_tokens=8, with_scores=True, **options,
    )  # fmt: skip


def assert_same(a, b):
    np.testing.assert_array_equal(a.scores, b.scores)
    np.testing.assert_array_equal(a.logits, b.logits)
    for mine, other in zip(kept_sets(a.cache).flat, kept_sets(b.cache).flat, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_ada_over_speckv_reads_the_draft():
    """An even share (alpha = 1) keeps what speckv keeps; any other keeps as many in each layer."""
    settings = dict(draft_tokens=5, window=6, kernel=3)
    plain = read(make_policy("speckv", **settings), draft=jnp.asarray(DRAFTS))
    even = read(make_policy("ada", inner="speckv", alpha=1, **settings), draft=jnp.asarray(DRAFTS))
    assert_same(even, plain)
    uneven = make_policy("ada", inner="speckv", alpha=0, **settings)
    assert uneven.reading == WithDraft(tokens=5)
    cut = read(uneven, draft=jnp.asarray(DRAFTS))
    np.testing.assert_array_equal(cut.scores, plain.scores)
    mine, other = np.asarray(cut.cache.length), np.asarray(plain.cache.length)
    np.testing.assert_array_equal(mine.sum(2), other.sum(2))
    assert (mine != other).any()


@pytest.mark.slow
def test_ada_over_kvzip_replays():
    """Nothing spread evenly (alpha = 0) is how kvzip shares a layer's budget itself."""
    settings = dict(chunk=32, sinks=2, allocate="layer")
    plain = read(make_policy("kvzip", **settings))
    assert_same(read(make_policy("ada", inner="kvzip", alpha=0, **settings)), plain)


@pytest.mark.parametrize("inner", ["h2o", "keydiff", "streaming_llm", "lookaheadkv"])
def test_ada_cuts_while_decoding_as_its_inner_policy_does(inner):
    policy = make_policy("ada", inner=inner)
    assert policy.decode_cut == make_policy(inner).decode_cut
    eviction = DecodeEviction(policy=policy, budget=12, interval=8)
    assert eviction.adds_up == (policy.decode_cut == CutByTokens(adds_up=True))
    # A prompt shorter than the budget keeps less than a head may hold later.
    for tokens, new in ((5, 1000), (5, 3), (70, 1000), (70, 2)):
        kept = policy.max_entries(tokens, 12, PLAIN)
        held = min(policy.max_entries(tokens + new, 12, PLAIN) + 8, kept + new)
        assert kept + eviction.room(tokens, new, PLAIN) >= held


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: POLICIES["snapkv"](window=2.5), "window must be an integer, not 2.5"),
        (lambda: POLICIES["laq"](draft_tokens=8.0), "draft_tokens must be an integer, not 8.0"),
        (lambda: POLICIES["speckv"](columns=True), "columns must be an integer, not True"),
        (lambda: POLICIES["snapkv"](pool="median"), "pool=median is not possible; choose max"),
        (lambda: Ada(alpha="0.5"), "alpha must be a number, not .0.5."),
        (lambda: make_policy("snapkv", window=2.5), "window=2.5 is not an integer"),
        (
            lambda: DecodeEviction(policy=make_policy("h2o"), budget=2.5, interval=4),
            "budget must be an integer, not 2.5",
        ),
        (
            lambda: DecodeEviction(policy=make_policy("h2o"), budget=2, interval=4.0),
            "interval must be an integer, not 4.0",
        ),
    ],
)
def test_fields_of_the_wrong_type_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        make()
    assert "\n" not in str(error.value)
