"""The 8B-shaped model in bfloat16 whose steps gpu.py measures and gpu_estimate.py counts."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import lookahead_jax as lk
from lookahead_jax.decoding.sampling import GREEDY, sampling_rows
from lookahead_jax.decoding.state import DecodeState, start
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, forward
from lookahead_jax.modules.definition import TARGETS, LookaheadConfig, init_modules

POLICIES = {
    "prefill alone": ("full", {}),
    "lookaheadkv": ("lookaheadkv", {}),
    "snapkv": ("snapkv", {}),
    "laq": ("laq", {}),
}


def random_modules(config: ModelConfig) -> Any:
    """Lookahead modules of the published sizes, untrained."""
    sizes = LookaheadConfig(tokens=32, rank=8, alpha=32.0, targets=tuple(TARGETS), init="normal")
    return init_modules(jax.random.key(1), sizes, config)


def filled_cache(entries: int, room: int, config: ModelConfig) -> lk.KVCache:
    """A cache of one row that holds `entries` random keys and values per head."""
    slots = -(-(entries + room) // 128) * 128
    shape = (config.num_layers, 1, config.num_kv_heads, slots)
    make = partial(jax.random.normal, shape=(*shape, config.head_dim), dtype=jnp.bfloat16)
    slot = jnp.arange(slots, dtype=jnp.int32)
    return lk.KVCache(
        k=make(jax.random.key(3)),
        v=make(jax.random.key(4)),
        pos=jnp.broadcast_to(jnp.where(slot < entries, slot, -1), shape),
        length=jnp.full(shape[:3], entries, jnp.int32),
        next_pos=jnp.full(1, entries, jnp.int32),
        rope_span=jnp.full(1, entries + room, jnp.int32),
    )


def opened(entries: int, steps: int, config: ModelConfig) -> DecodeState:
    """The state before a greedy request of `steps` tokens on a cache of `entries`."""
    return start(
        filled_cache(entries, steps, config), jnp.zeros((1, config.vocab_size), jnp.float32),
        sampling=sampling_rows([GREEDY], [0], config.vocab_size),
        limit=jnp.full(1, steps + 1, jnp.int32), eos=jnp.full(1, -1, jnp.int32),
        seen=None, width=steps + 1,
    )  # fmt: skip


def one_step(entries: int, config: ModelConfig, params: Any, cache: Any, tokens: Any) -> jax.Array:
    """The model's choices after each of a few tokens that follow `entries` others."""
    positions = entries + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    block = Block(lk.embed(params, tokens, config=config), positions, cache.rope_span)
    hidden = forward(params, block, cache, config=config).hidden
    return lk.logits(params, hidden, config=config).argmax(-1)


def step_bytes(entries: int, params: Any, config: ModelConfig) -> int:
    """Bytes of the filled slots and of the weights, except the embedding table.

    A step reads one row of the table.
    """
    size = params["embed"].dtype.itemsize
    weights = size * (sum(a.size for a in jax.tree.leaves(params)) - params["embed"].size)
    entry = config.num_layers * config.num_kv_heads * config.head_dim * size
    return weights + 2 * entries * entry
