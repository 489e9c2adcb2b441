"""Compiled functions of a draft model with another vocabulary: reading, and drafting a chain."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from lookahead_jax.model.cache import Entries, KVCache, commit
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, embed, forward, logits
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params
from lookahead_jax.prefilling.prefill import extend

_CHUNK = 64  # rows per step of reading, computed in full, for texts of any length


@struct.dataclass
class FirstTokens:
    """The draft tokens that may come first: those with low <= rank < high, or all if high < 0.

    Of these, only the one of rank `low` may be a token that the target has too.
    """

    rank: jax.Array  # [V] int32
    shared: jax.Array  # [V] bool
    low: jax.Array  # [] int32
    high: jax.Array  # [] int32


def rewound(cache: KVCache, keep: jax.Array) -> KVCache:
    """The cache [B] of the first `keep` [B] tokens; nothing was ever evicted from it."""
    return dataclasses.replace(
        cache,
        pos=jnp.where(cache.pos < keep[None, :, None, None], cache.pos, -1),
        length=jnp.minimum(cache.length, keep[None, :, None]),
        next_pos=jnp.minimum(cache.next_pos, keep),
    )


@program(static_argnames=("config",), donate_argnames=("cache",))
def read(
    params: Params, cache: KVCache, keep: Int[Array, " B"], tokens: Int[Array, "B T"],
    *, config: ModelConfig,
) -> KVCache:  # fmt: skip
    """The cache of the first `keep` tokens and of `tokens`, padded with -1, behind them."""
    return extend(params, tokens, rewound(cache, keep), config=config, chunk=_CHUNK)[0]


@program(static_argnames=("config", "steps"), donate_argnames=("cache",))
def draft_chain(
    params: Params,
    cache: KVCache,
    keep: Int[Array, " B"],
    tokens: Int[Array, "B T"],
    first: FirstTokens,
    least: Float[Array, ""],
    *,
    config: ModelConfig,
    steps: int,
) -> tuple[KVCache, Int[Array, "B steps"]]:
    """Reads as `read`, then drafts the likeliest token up to `steps` times.

    A row's chain ends, and is padded with -1, before a token that makes its probability smaller
    than `least`. The cache also holds the drafted tokens, but the last.
    """
    cache, scores = extend(params, tokens, rewound(cache, keep), config=config)
    allowed = (first.rank >= first.low) & (first.rank < first.high)
    allowed = (allowed & (~first.shared | (first.rank == first.low))) | (first.high < 0)
    bound = jnp.log(least)

    def choose(scores: jax.Array, path: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The likeliest token [B], -1 if its path is too unlikely, and its path's probability."""
        scores = jax.nn.log_softmax(scores, axis=-1)
        path = path + scores.max(-1)
        token = jnp.where(path >= bound, jnp.argmax(scores, -1).astype(jnp.int32), -1)
        return token, path

    def unfinished(carry):
        i, token, *_ = carry
        return (i < steps) & (token >= 0).any()

    def step(carry):
        # Written before it is read, see step.decode_burst.
        i, token, path, cache, pending, drafted = carry
        cache = commit(cache, pending)
        positions = jnp.where(token >= 0, cache.next_pos, -1)[:, None]
        x = embed(params, token[:, None], config=config)
        out = forward(params, Block(x, positions, cache.rope_span), cache, config=config)
        count = (token >= 0).astype(jnp.int32)
        pending = Entries(out.k, out.v, positions, nothing, count)
        scores = logits(params, out.hidden, config=config)[:, 0]
        following, path = choose(scores, path)
        token = jnp.where(token >= 0, following, -1)
        return i + 1, token, path, cache, pending, drafted.at[:, i].set(token)

    batch = tokens.shape[0]
    token, path = choose(jnp.where(allowed[None], scores, -jnp.inf), jnp.zeros(batch, jnp.float32))
    drafted = jnp.full((batch, steps), -1, jnp.int32).at[:, 0].set(token)
    empty = jnp.zeros((*cache.k.shape[:3], 1, cache.k.shape[4]), cache.k.dtype)
    nothing = jnp.zeros((batch, 1), jnp.int32)
    pending = Entries(empty, empty, nothing, nothing, nothing[:, 0])
    carry = (jnp.int32(1), token, path, cache, pending, drafted)
    _, _, _, cache, pending, drafted = jax.lax.while_loop(unfinished, step, carry)
    return commit(cache, pending), drafted
