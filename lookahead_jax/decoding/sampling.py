"""Logits -> the distribution that a request asked for -> a token.

Noise depends on (request seed, absolute position), never on batch row or step: the token at a
position does not depend on other rows, on the number of tokens that a step verifies, or on a
drafter. B batch, P rows of a step (tree nodes), V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt

from lookahead_jax.host.integers import whole_id

MAX_BIASES = 300  # tokens that one request may name in `logit_bias`
MAX_BIAS = 100.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request chooses tokens. Temperature 0 is greedy.

    What acts, in this order: logit bias, repetition penalty, frequency and presence penalty,
    temperature, top-k, top-p, min-p. Bias, frequency and presence penalty have the meaning of
    OpenAI's API and the order of vLLM; the others have meaning and order of transformers.
    Raises ValueError for a value out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None  # keep the k most likely tokens (and ties with the k-th)
    top_p: float | None = None  # keep the smallest set with at least this probability
    min_p: float | None = None  # drop tokens below this fraction of the most likely one
    repetition_penalty: float = 1.0  # divides (multiplies) positive (negative) seen logits
    presence_penalty: float = 0.0  # subtracted from the logits of tokens that the output has
    frequency_penalty: float = 0.0  # subtracted once for every time that the output has the token
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    """Token id -> what is added to its logit, -100 to 100; at most 300 tokens."""

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
        for name in ("presence_penalty", "frequency_penalty"):
            if not np.isfinite(value := getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {value}")
        if len(self.logit_bias) > MAX_BIASES:
            raise ValueError(
                f"logit_bias may name up to {MAX_BIASES} tokens, got {len(self.logit_bias)}"
            )
        for token, bias in self.logit_bias.items():
            if whole_id(token, "a token of logit_bias") < 0 or not abs(bias) <= MAX_BIAS:
                raise ValueError(
                    f"logit_bias takes token ids from 0 and values from {-MAX_BIAS:g} to "
                    f"{MAX_BIAS:g}, got {token}: {bias}"
                )

    def check_ids(self, vocab_size: int) -> None:
        """Raises ValueError for a biased token that a model with so many tokens does not have."""
        if (largest := max(self.logit_bias, default=0)) >= vocab_size:
            raise ValueError(
                f"logit_bias names token {largest}; this model's ids are 0 to {vocab_size - 1}: "
                "leave it out"
            )


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
    presence: jax.Array  # [B] float32, 0 = off
    frequency: jax.Array  # [B] float32, 0 = off
    bias_ids: jax.Array  # [B, MAX_BIASES] int32, -1 = none; [B, 0] if not `biased`
    bias: jax.Array  # the same, float32
    sampled: bool = struct.field(pytree_node=False)
    filtered: bool = struct.field(pytree_node=False)
    penalized: bool = struct.field(pytree_node=False)  # some row has a repetition penalty
    counted: bool = struct.field(pytree_node=False)  # some row has a penalty on the output's tokens
    biased: bool = struct.field(pytree_node=False)


def sampling_rows(
    requests: Sequence[Sampling], seeds: Sequence[int], vocab_size: int
) -> SamplingRows:
    """Packs one `Sampling` and seed per row. Seeds are taken modulo 2**32.

    Raises ValueError for a biased token outside the vocabulary.
    """
    for request in requests:
        request.check_ids(vocab_size)

    def column(name, off, dtype):
        values = [getattr(r, name) for r in requests]
        return jnp.asarray([off if v is None else v for v in values], dtype)

    filters = ("top_k", "top_p", "min_p")
    biased = any(r.logit_bias for r in requests)
    bias_ids, bias = _packed_bias(requests, MAX_BIASES if biased else 0)
    return SamplingRows(
        seed=jnp.asarray(np.asarray([s % 2**32 for s in seeds], np.uint32)),
        temperature=column("temperature", 0.0, jnp.float32),
        top_k=jnp.asarray([min(r.top_k or vocab_size, vocab_size) for r in requests], jnp.int32),
        top_p=column("top_p", 1.0, jnp.float32),
        min_p=column("min_p", 0.0, jnp.float32),
        penalty=column("repetition_penalty", 1.0, jnp.float32),
        presence=column("presence_penalty", 0.0, jnp.float32),
        frequency=column("frequency_penalty", 0.0, jnp.float32),
        bias_ids=jnp.asarray(bias_ids),
        bias=jnp.asarray(bias),
        sampled=any(r.temperature > 0 for r in requests),
        filtered=any(getattr(r, f) is not None for r in requests for f in filters),
        penalized=any(r.repetition_penalty != 1.0 for r in requests),
        counted=any(r.presence_penalty or r.frequency_penalty for r in requests),
        biased=biased,
    )


def with_everything(rows: SamplingRows) -> SamplingRows:
    """The same rows for a program with every setting; unused ones are skipped at run time."""
    missing = MAX_BIASES - rows.bias_ids.shape[1]
    return dataclasses.replace(
        rows,
        bias_ids=jnp.pad(rows.bias_ids, ((0, 0), (0, missing)), constant_values=-1),
        bias=jnp.pad(rows.bias, ((0, 0), (0, missing))),
        sampled=True,
        filtered=True,
        penalized=True,
        counted=True,
        biased=True,
    )


def _packed_bias(requests: Sequence[Sampling], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Biased tokens of each row [B, most] int32, -1 where there is none, and their biases."""
    ids = np.full((len(requests), most), -1, np.int32)
    bias = np.zeros((len(requests), most), np.float32)
    for row, request in enumerate(requests):
        count = len(request.logit_bias)
        ids[row, :count] = list(request.logit_bias)
        bias[row, :count] = list(request.logit_bias.values())
    return ids, bias


class TextSoFar(NamedTuple):
    """What penalties look at: the tokens before a step, and those on the way to each node."""

    seen: jax.Array | None  # [B, V] bool tokens of prompt and output; None: not needed
    counts: jax.Array | None  # [B, V] int32 how often the output has each; None: not needed
    path: jax.Array | None = None
    """[B, P, A] int32, -1 = none: tokens from the root to each node, without the root, which is
    in the text already. None: there is only the root."""
    rows: jax.Array | None = None
    """[R] int32: row r of the logits goes on in row rows[r] of the tables. None: in row r."""


def process_logits(
    logits: Float[Array, "B P V"], text: TextSoFar, rows: SamplingRows
) -> Float[Array, "B P V"]:
    """Applies each row's bias, penalties, temperature and filters; dropped tokens become -inf.

    The penalties of a node depend on `text` and on the node's own path.
    """
    logits = _adjust(logits, text, rows)
    if not rows.sampled:
        return logits
    temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)
    logits = logits / temperature[:, None, None]
    if not rows.filtered:
        return logits
    off = (rows.top_k >= logits.shape[-1]) & (rows.top_p >= 1.0) & (rows.min_p <= 0.0)
    return jax.lax.cond(off.all(), lambda logits: logits, partial(_filter, rows), logits)


def _adjust(logits: jax.Array, text: TextSoFar, rows: SamplingRows) -> jax.Array:
    """Logits [B, P, V] with bias and penalties, or as they are if no row has any."""
    steps, used = [], jnp.asarray(False)
    if rows.biased:
        steps.append(_bias)
        used |= (rows.bias_ids >= 0).any()
    if rows.penalized and text.seen is not None:
        steps.append(_penalize_seen)
        used |= (rows.penalty != 1.0).any()
    if rows.counted and text.counts is not None:
        steps.append(_penalize_counts)
        used |= ((rows.presence != 0.0) | (rows.frequency != 0.0)).any()

    def adjusted(logits):
        for step in steps:
            logits = step(logits, text, rows)
        return logits

    return jax.lax.cond(used, adjusted, lambda logits: logits, logits) if steps else logits


def _bias(logits: jax.Array, text: TextSoFar, rows: SamplingRows) -> jax.Array:
    batch, _, vocab = logits.shape
    ids = jnp.where(rows.bias_ids >= 0, rows.bias_ids, vocab)
    dense = jnp.zeros((batch, vocab), logits.dtype)
    dense = dense.at[jnp.arange(batch)[:, None], ids].set(rows.bias, mode="drop")
    return logits + dense[:, None]


def _penalize_seen(logits: jax.Array, text: TextSoFar, rows: SamplingRows) -> jax.Array:
    """The repetition penalty (Keskar et al. 2019, CTRL, arXiv:1909.05858)."""
    seen = _on_paths(text.seen, text, lambda at: at.set(True, mode="drop"))
    penalty = rows.penalty[:, None, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _penalize_counts(logits: jax.Array, text: TextSoFar, rows: SamplingRows) -> jax.Array:
    """OpenAI's formula: logit - count * frequency - [count > 0] * presence."""
    counts = _on_paths(text.counts, text, lambda at: at.add(1, mode="drop"))
    frequency, presence = rows.frequency[:, None, None], rows.presence[:, None, None]
    logits = logits - counts.astype(logits.dtype) * frequency
    return logits - jnp.where(counts > 0, presence, 0.0)


def _on_paths(table: Any, text: TextSoFar, update: Callable[[Any], jax.Array]) -> jax.Array:
    """A row's `table` [B, V] at each of its nodes [B, P, V], updated at the tokens of its path."""
    path, table = text.path, table if text.rows is None else table[text.rows]
    if path is None:
        return table[:, None]
    batch, nodes, _ = path.shape
    every = jnp.broadcast_to(table[:, None], (batch, nodes, table.shape[1]))
    bi, ni = jnp.arange(batch)[:, None, None], jnp.arange(nodes)[None, :, None]
    return update(every.at[bi, ni, jnp.where(path >= 0, path, table.shape[1])])


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
