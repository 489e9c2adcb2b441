"""rerotate: kept entries move together, and their keys are those of tokens read at these places."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.decoding.eviction import DecodeEviction
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.prompts.read import read_prompt
from tests import reference, tiny
from tests.test_policies import PLAIN, RICH, weights

LENGTHS = (70, 33, 12)
BUDGET = 24


def read(model, policy, **options):
    return read_prompt(
        weights(model), tiny.batch(LENGTHS, model), config=model, policy=policy, budget=BUDGET,
        new_tokens=8, **options,
    )  # fmt: skip


@pytest.mark.parametrize("inner", ["snapkv", "ada:snapkv"])
def test_keys_turn_by_as_much_as_entries_move(inner):
    """Heads of unequal size end together; values, order and logits stay."""
    plain, moved = (read(RICH, make_policy(name)) for name in (inner, f"rerotate:{inner}"))
    np.testing.assert_array_equal(moved.logits, plain.logits)
    before, after = plain.cache, moved.cache
    np.testing.assert_array_equal(after.length, before.length)
    np.testing.assert_array_equal(after.v, before.v)
    most = np.asarray(before.length).max((0, 2))
    np.testing.assert_array_equal(after.next_pos, most)
    for at in np.ndindex(*before.length.shape):
        count, old = int(before.length[at]), np.asarray(before.pos)[at]
        new = np.asarray(after.pos)[at]
        assert (new[count:] == -1).all()
        np.testing.assert_array_equal(new[:count], most[at[1]] - count + np.arange(count))
        rope = RICH.ropes[RICH.layer_rope[at[0]]]
        for slot in range(count):
            turn = reference.rotation(new[slot] - old[slot], rope, RICH)
            expected = turn @ np.asarray(before.k[at][slot], np.float64)
            np.testing.assert_allclose(after.k[at][slot], expected, atol=2e-6)


def test_keys_are_those_of_the_kept_tokens_read_alone():
    """True of the first layer, whose keys depend on token and place alone; RoPE that is scaled."""
    scaled = dataclasses.replace(
        PLAIN.ropes[0], kind="yarn", factor=4.0, original_max_position=16, truncate=True,
        beta_fast=32.0, beta_slow=1.0,
    )  # fmt: skip
    model = dataclasses.replace(PLAIN, ropes=(scaled,))
    tokens = np.asarray(tiny.batch(LENGTHS, model))
    plain, moved = (read(model, make_policy(name)) for name in ("tova", "rerotate:tova"))
    kept = np.asarray(plain.cache.pos)[0, :, 0, :BUDGET]
    alone = np.where(kept >= 0, np.take_along_axis(tokens, np.maximum(kept, 0), 1), -1)
    whole = read_prompt(
        weights(model), jnp.asarray(alone), config=model, policy=Full(), budget=0, new_tokens=0
    )
    np.testing.assert_allclose(
        moved.cache.k[0, :, 0, :BUDGET], whole.cache.k[0, :, 0, :BUDGET], atol=1e-5
    )


def test_keys_in_eight_bits_are_turned_as_well():
    exact, rounded = (
        read(PLAIN, make_policy("rerotate:snapkv"), cache_dtype=dtype).cache
        for dtype in (None, "int8")
    )
    assert rounded.k.dtype == jnp.int8
    keys = np.asarray(rounded.k, np.float32) * np.asarray(rounded.k_scale)[..., None]
    largest = np.abs(np.asarray(exact.k)).max()
    np.testing.assert_allclose(keys, exact.k, atol=0.02 * largest)


def test_generation_goes_on_at_the_budget_drafted_or_not():
    model = lk.load(lk.EMBEDDED_MODEL)
    prompts = [[2 + i % 90 for i in range(90)], [5 + i % 7 for i in range(40)]]
    settings = dict(
        policy=make_policy("rerotate:snapkv", window=4), budget=16, max_new_tokens=12,
        questions=[[7, 8, 9], [7, 8]],
    )  # fmt: skip
    plain = lk.generate(model, prompts, **settings)
    drafted = lk.generate(model, prompts, drafter="prompt_lookup", draft_nodes=8, **settings)
    assert drafted.tokens == plain.tokens
    assert (np.asarray(plain.cache.kept_per_head) == 16).all()
    np.testing.assert_array_equal(plain.kept[0, 0, 0], np.arange(16))


def test_what_reads_positions_refuses_it():
    policy = make_policy("ada:rerotate:snapkv")
    model = lk.load(lk.EMBEDDED_MODEL)
    with pytest.raises(ValueError, match=r"score reads which entries .*leave rerotate out"):
        lk.score(model, np.ones((1, 4), np.int32), policy=policy)
    with pytest.raises(ValueError, match="Ada cannot evict while decoding"):
        DecodeEviction(policy=policy, budget=8, interval=8)
    for name, settings, reason in (
        ("full", {}, "it leaves no gaps"),
        ("rerotate", {}, "it moves entries itself"),
        ("incremental:knorm", {"every": 8}, "its cuts come at fixed positions"),
    ):
        with pytest.raises(ValueError, match=reason):
            make_policy(f"rerotate:{name}", **settings)
