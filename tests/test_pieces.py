"""A prompt that is read in pieces is the prompt that `prefill` reads."""

import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.model.params import unstack
from lookahead_jax.modules.definition import observer_block
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.prefilling import batching
from lookahead_jax.prefilling.pieces import prefill_in_pieces, reusable_chunks
from lookahead_jax.prefilling.prefill import prefill
from lookahead_jax.prompts.read import read_prompt, read_prompt_in_pieces
from tests import tiny
from tests.test_policies import RICH, lookahead_modules, weights

LENGTHS, BUDGET = (70, 33, 61), 20
TOLERANCE = 2e-5  # as in test_prefill.py


def run(pieces):
    """What a generator returns, and how often it has yielded."""
    count = 0
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value, count
        count += 1


def assert_equal(ours, expected):
    """The same entries, and values that differ by rounding at most."""
    for name in ("pos", "length", "next_pos", "rope_span"):
        np.testing.assert_array_equal(getattr(ours.cache, name), getattr(expected.cache, name))
    pairs = [(ours.logits, expected.logits), (ours.scores, expected.scores)]
    pairs += [(getattr(ours.cache, n), getattr(expected.cache, n)) for n in ("k", "v")]
    for value, other in pairs:
        if other is None:
            assert value is None
            continue
        other = np.asarray(other, np.float32)
        np.testing.assert_allclose(
            np.asarray(value, np.float32), other, rtol=0, atol=TOLERANCE * np.abs(other).max()
        )


@pytest.mark.parametrize(
    ("name", "chunk", "form", "cache_dtype"),
    [
        ("snapkv", 16, "stacked", None),  # a window observes
        ("snapkv", 128, "apart", None),
        ("h2o", 16, "apart", None),  # statistics over chunks
        ("lookaheadkv", 16, "stacked", None),  # an observer after the prompt
        ("lookaheadkv", 128, "apart", None),  # and beside it
        ("pyramidkv", 16, "apart", None),  # another budget in each layer
        ("full", 32, "stacked", "int8"),
    ],
)
def test_pieces_equal_prefill(name, chunk, form, cache_dtype):
    params, tokens = weights(RICH), tiny.batch(LENGTHS, RICH)
    policy, observer = make_policy(name), None
    if name == "lookaheadkv":
        length = (tokens >= 0).sum(1)
        observer = observer_block(lookahead_modules(RICH), length, length)
    settings = dict(
        config=RICH, policy=policy, budget=BUDGET, observer=observer, chunk=chunk,
        slots=batching.slots_for(policy, tokens.shape[1], BUDGET, 8, config=RICH),
        with_scores=cache_dtype is None, cache_dtype=cache_dtype,
        pinned=jnp.asarray(batching.pin_mask([[(3, 5)], [], [(40, 41)]], np.asarray(tokens))),
    )  # fmt: skip
    expected = prefill(params, tokens, **settings)
    form = params if form == "stacked" else unstack(params)
    read, count = run(prefill_in_pieces(form, tokens, **settings))
    assert_equal(read.prefilled, expected)
    # Chunks that hold no token are no pieces: 70 tokens are five chunks of 16.
    chunks = -(-max(LENGTHS) // chunk)
    assert count == RICH.num_layers * (1 if chunks == 1 else chunks + 1)


def test_chunks_of_an_earlier_reading_are_taken_over():
    params, policy = weights(RICH), make_policy("snapkv", window=8)
    first, second = (tiny.batch(lengths, RICH) for lengths in ((70, 61), (68, 64)))
    second = second.at[:, :32].set(first[:, :32])
    settings = dict(
        config=RICH,
        policy=policy,
        budget=BUDGET,
        chunk=16,
        slots=batching.slots_for(policy, first.shape[1], BUDGET, 8, config=RICH),
    )
    earlier, _ = run(prefill_in_pieces(params, first, **settings, returned=2))
    expected = prefill(params, second, **settings)
    read, count = run(
        prefill_in_pieces(params, second, **settings, known=earlier.chunks, returned=3)
    )
    assert_equal(read.prefilled, expected)
    assert count == RICH.num_layers * (3 + 1)  # of five chunks
    whole, _ = run(prefill_in_pieces(params, second, **settings, returned=3))
    assert (len(earlier.chunks), len(read.chunks), len(whole.chunks)) == (2, 1, 3)
    for one, other in zip([*earlier.chunks, *read.chunks], whole.chunks, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * np.abs(b).max())


def test_the_last_token_and_what_observes_are_read_in_any_case():
    model = tiny.config()
    for name, length, chunks in (
        ("snapkv", 1024, 1),
        ("snapkv", 1032, 2),
        ("full", 1024, 1),
        ("full", 1025, 2),
        ("snapkv", 5, 0),
        ("h2o", 2000, 0),  # adds up what all tokens attend to
    ):
        policy = make_policy(name, **({"window": 8} if name == "snapkv" else {}))
        assert reusable_chunks(policy, length, 64, model) == chunks


@pytest.mark.parametrize("name", ["lookaheadkv", "laq", "snapkv"])
def test_any_policy_is_read_as_read_prompt_reads_it(name):
    model = tiny.config()
    params, tokens = tiny.params(model), tiny.batch((30, 20), model)
    settings = dict(
        config=model,
        policy=make_policy(name),
        budget=12,
        new_tokens=4,
        known_tokens=3,
        modules=lookahead_modules(model) if name == "lookaheadkv" else None,
    )
    expected = read_prompt(params, tokens, **settings)
    read, count = run(read_prompt_in_pieces(params, tokens, **settings))
    assert_equal(read.prefilled, expected)
    assert count == (0 if name == "laq" else model.num_layers)


def test_more_pins_than_the_budget_are_refused():
    model = tiny.config()
    pinned = jnp.ones((1, 16), bool)
    pieces = read_prompt_in_pieces(
        tiny.params(model), tiny.batch((16,), model), config=model, policy=make_policy("snapkv"),
        budget=12, new_tokens=4, pinned=pinned,
    )  # fmt: skip
    with pytest.raises(ValueError, match="pins 16 tokens and the budget is 12"):
        next(pieces)
