"""Branches that a small model writes token by token, behind its cache.

The entries of their tokens stand in a small cache of their own, which is thrown away afterwards.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lookahead_jax.decoding.device_drafter import Weights
from lookahead_jax.model.cache import Entries, KVCache, commit
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, embed, forward


def open_branches(cache: KVCache, count: int, *, depth: int) -> KVCache:
    """`count` empty branches for each row of `cache`, with room for `depth` tokens each."""
    return dataclasses.replace(cache.branch(count, slots=depth), shared=None)


def read_newest(
    weights: Weights, cache: KVCache, branches: KVCache, tokens: jax.Array, *, config: ModelConfig
) -> tuple[KVCache, jax.Array]:
    """Reads the newest token [R] of every branch behind `cache`; -1: the branch has ended.

    Returns the branches with its entries, and the hidden states [R, D] after the final norm.
    """
    positions = jnp.where(tokens >= 0, branches.next_pos, -1)[:, None]
    block = Block(embed(weights, tokens[:, None], config=config), positions, branches.rope_span)
    out = forward(weights, block, dataclasses.replace(branches, shared=cache), config=config)
    kept = (tokens >= 0).astype(jnp.int32)
    entries = Entries(out.k, out.v, positions, jnp.zeros_like(positions), kept)
    return commit(branches, entries), out.hidden[:, 0]
