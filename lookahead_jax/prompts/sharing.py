"""What prompts that begin alike take over from each other, instead of reading it again."""

from functools import partial

import jax
import jax.numpy as jnp

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.params import Params
from lookahead_jax.policies.base import OnePass, Policy, WithCuts, WithLookup, WithModules
from lookahead_jax.prefilling.batching import slots_for
from lookahead_jax.prefilling.layer_pass import CHUNK
from lookahead_jax.prefilling.pieces import ChunkEntries, reusable_chunks
from lookahead_jax.prompts.cut_reading import CutReading, CutState, empty_state, spacing

Shared = ChunkEntries | CutState
"""What a prompt takes over from an earlier one, of one part of its beginning."""


def has_pieces(policy: Policy) -> bool:
    """Whether prompts are read in pieces: once, without a draft from outside."""
    return isinstance(policy.reading, OnePass | WithModules | WithLookup)


def shared_tokens(policy: Policy, config: ModelConfig) -> int:
    """The tokens of each part that prompts which begin alike share; 0: they share nothing.

    Chunks are shared where none gathers statistics over them all, states wherever there are any.
    """
    if isinstance(policy.reading, WithCuts):
        return spacing(policy.reading)
    return CHUNK if has_pieces(policy) and policy.init_stats(1, CHUNK, config) is None else 0


def reusable_parts(policy: Policy, length: int, budget: int, config: ModelConfig) -> int:
    """How many first parts of a prompt of `length` tokens need not be read again, at most."""
    if isinstance(policy.reading, WithCuts):
        return length // spacing(policy.reading)
    return reusable_chunks(policy, length, budget, config)


def part_bytes(
    params: Params,
    *,
    config: ModelConfig,
    policy: Policy,
    budget: int,
    longest: int,
    cache_dtype: str | None,
) -> int:
    """Bytes of one part of one prompt that others take over; the arguments are those of reading."""
    if not isinstance(policy.reading, WithCuts):
        entry = 2 * config.num_kv_heads * config.head_dim * config.num_layers
        return CHUNK * entry * params["embed"].dtype.itemsize
    reading = CutReading.of(
        policy, config=config, budget=budget, cache_dtype=cache_dtype,
        slots=slots_for(policy, longest, budget, 0, config=config),
    )  # fmt: skip
    span = jax.ShapeDtypeStruct((1,), jnp.int32)
    state = jax.eval_shape(partial(empty_state, reading=reading), params, span)
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
