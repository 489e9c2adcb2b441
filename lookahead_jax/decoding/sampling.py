"""Logits -> the distribution that a request asked for -> a token.

Noise depends on (request seed, absolute position), never on batch row or step: the token at a
position does not depend on other rows, on the number of tokens that a step verifies, or on a
drafter. B batch, P rows of a step (tree nodes), V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request chooses tokens. Temperature 0 is greedy; the filters apply in this order.

    Order and meaning follow transformers: repetition penalty, temperature, top-k, top-p, min-p.
    Raises ValueError for a value out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None  # keep the k most likely tokens (and ties with the k-th)
    top_p: float | None = None  # keep the smallest set with at least this probability
    min_p: float | None = None  # drop tokens below this fraction of the most likely one
    repetition_penalty: float = 1.0  # divides (multiplies) positive (negative) seen logits

    def __post_init__(self):
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if self.top_k is not None and (self.top_k < 1 or self.top_k % 1 != 0):
            raise ValueError(f"top_k must be a whole number from 1, got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value}")
        if not (np.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty must be > 0, got {self.repetition_penalty}")


GREEDY = Sampling()


@struct.dataclass
class SamplingRows:
    """The settings of a batch of requests. Settings that no row uses are not compiled.

    Compiled ones are skipped at run time while no row uses them. Results are the same either way,
    so rows with any settings can share a program that includes all of them.
    """

    seed: jax.Array  # [B] uint32
    temperature: jax.Array  # [B] float32, 0 = greedy
    top_k: jax.Array  # [B] int32, V = off
    top_p: jax.Array  # [B] float32, 1 = off
    min_p: jax.Array  # [B] float32, 0 = off
    penalty: jax.Array  # [B] float32, 1 = off
    sampled: bool = struct.field(pytree_node=False)
    filtered: bool = struct.field(pytree_node=False)
    penalized: bool = struct.field(pytree_node=False)


def sampling_rows(
    requests: Sequence[Sampling], seeds: Sequence[int], vocab_size: int
) -> SamplingRows:
    """Packs one `Sampling` and seed per row. Seeds are taken modulo 2**32."""

    def column(name, off, dtype):
        values = [getattr(r, name) for r in requests]
        return jnp.asarray([off if v is None else v for v in values], dtype)

    filters = ("top_k", "top_p", "min_p")
    return SamplingRows(
        seed=jnp.asarray(np.asarray([s % 2**32 for s in seeds], np.uint32)),
        temperature=column("temperature", 0.0, jnp.float32),
        top_k=jnp.asarray([min(r.top_k or vocab_size, vocab_size) for r in requests], jnp.int32),
        top_p=column("top_p", 1.0, jnp.float32),
        min_p=column("min_p", 0.0, jnp.float32),
        penalty=column("repetition_penalty", 1.0, jnp.float32),
        sampled=any(r.temperature > 0 for r in requests),
        filtered=any(getattr(r, f) is not None for r in requests for f in filters),
        penalized=any(r.repetition_penalty != 1.0 for r in requests),
    )


def process_logits(
    logits: Float[Array, "B P V"], seen: Bool[Array, "B _ V"] | None, rows: SamplingRows
) -> Float[Array, "B P V"]:
    """Applies each row's penalty, temperature and filters; dropped tokens come out as -inf.

    `seen` marks the tokens of the prompt and of the path to each node; only read if some row has
    a repetition penalty.
    """
    if rows.penalized and seen is not None:
        penalty = rows.penalty[:, None, None]
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if not rows.sampled:
        return logits
    temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)
    logits = logits / temperature[:, None, None]
    if not rows.filtered:
        return logits
    off = (rows.top_k >= logits.shape[-1]) & (rows.top_p >= 1.0) & (rows.min_p <= 0.0)
    return jax.lax.cond(off.all(), lambda logits: logits, partial(_filter, rows), logits)


def _filter(rows: SamplingRows, logits: jax.Array) -> jax.Array:
    """Top-k, top-p and min-p; a sort of the vocabulary."""
    vocab = logits.shape[-1]
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(vocab, dtype=jnp.int32)[None, None]
    kth = jnp.take_along_axis(ordered, (rows.top_k - 1)[:, None, None], axis=-1)
    ordered = jnp.where(ordered >= kth, ordered, -jnp.inf)
    p = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p  # probability of the tokens ahead of this one
    # A sum of float32 can reach 1 before its end: top_p = 1 must not drop what comes after.
    top_p = jnp.where(rows.top_p < 1.0, rows.top_p, jnp.inf)[:, None, None]
    keep = (ordered > -jnp.inf) & ((before < top_p) | (rank == 0))
    likely = p >= rows.min_p[:, None, None] * p[..., :1]
    lowest = jnp.min(jnp.where(keep & likely, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def choose_tokens(
    logits: Float[Array, "B P V"], positions: Int[Array, "B P"], rows: SamplingRows
) -> Int[Array, "B P"]:
    """Picks a token from processed logits: argmax, or Gumbel-max with position-keyed noise.

    `positions` are those the chosen tokens will have. Ties go to the lower id.
    """
    if not rows.sampled:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def gumbel(key):
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    def noisy(logits):
        noise = keyed_noise(gumbel, rows.seed, positions)
        return logits + jnp.where(random[:, None, None], noise, 0.0)

    random = rows.temperature > 0
    logits = jax.lax.cond(random.any(), noisy, lambda logits: logits, logits)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def keyed_noise(
    draw: Callable[[jax.Array], jax.Array],
    seeds: UInt[Array, " B"],
    positions: Int[Array, "B P"],
    use: int | None = None,
    *,
    distinct: bool = False,
) -> Float[Array, "B P ..."]:
    """`draw(key)` for each position of each row; the key depends only on (seed, position).

    `use` distinguishes several uses of noise at one position. With `distinct`, entries at the same
    position get different noise, by their place in P.
    """

    def one(seed, position, place):
        key = jax.random.fold_in(jax.random.key(seed), position)
        key = key if use is None else jax.random.fold_in(key, use)
        return draw(jax.random.fold_in(key, place) if distinct else key)

    places = jnp.arange(positions.shape[1], dtype=jnp.int32)
    return jax.vmap(jax.vmap(one, (None, 0, 0)), (0, 0, None))(seeds, positions, places)
