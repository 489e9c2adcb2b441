"""Log-probabilities of emitted tokens, and of the likeliest tokens in their places.

They are the model's own: the log-softmax of its float32 logits, before bias, penalties, temperature
and filters. They are recorded on the device with the tokens, only for rows that ask. B batch, P
nodes, V vocabulary, W room for tokens, A alternatives.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from lookahead_jax.decoding.tree import Accepted
from lookahead_jax.host.integers import check_integer

MAX_ALTERNATIVES = 20  # per token


def check_alternatives(logprobs: int | None) -> None:
    """Raises ValueError unless `logprobs` is None or a possible number of alternatives."""
    if logprobs is None:
        return
    check_integer("logprobs", logprobs, least=0)
    if logprobs > MAX_ALTERNATIVES:
        raise ValueError(f"logprobs must be at most {MAX_ALTERNATIVES}, not {logprobs}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Natural log-probabilities of a row's tokens under the model, before any processor."""

    chosen: np.ndarray  # [n] float32 of the tokens themselves
    top: np.ndarray  # [n, A] float32 of the likeliest tokens, descending
    top_ids: np.ndarray  # [n, A] int32

    def between(self, begin: int, end: int, alternatives: int | None = None) -> "Logprobs":
        """Those of tokens `begin` to `end`, with at most so many alternatives (None: all)."""
        return Logprobs(
            chosen=self.chosen[begin:end].copy(),
            top=self.top[begin:end, :alternatives].copy(),
            top_ids=self.top_ids[begin:end, :alternatives].copy(),
        )


@struct.dataclass
class LogprobRecord:
    """The log-probabilities of a batch in the middle of decoding, beside its emitted tokens."""

    asked: jax.Array  # [B] bool; nothing is recorded for other rows
    chosen: jax.Array  # [B, W] float32
    top: jax.Array  # [B, W, A] float32
    top_ids: jax.Array  # [B, W, A] int32


class Measured(NamedTuple):
    """What a step adds to the record, for the tokens that it emits."""

    chosen: jax.Array  # [B, P] float32
    top: jax.Array  # [B, P, A] float32
    top_ids: jax.Array  # [B, P, A] int32


def empty_record(asked: Bool[Array, " B"], *, width: int, alternatives: int) -> LogprobRecord:
    """A record with room for `width` tokens a row, each with so many alternatives."""
    shape = (asked.shape[0], width)
    return LogprobRecord(
        asked=asked,
        chosen=jnp.zeros(shape, jnp.float32),
        top=jnp.zeros((*shape, alternatives), jnp.float32),
        top_ids=jnp.zeros((*shape, alternatives), jnp.int32),
    )


def measure(
    record: LogprobRecord,
    raw: Float[Array, "A Q V"],
    accepted: Accepted,
    places: Int[Array, "B P"] | None = None,
) -> Measured:
    """Log-probabilities of the tokens that a step emits; computed only if some row asks.

    `raw` are the model's logits at each node of the step [B, P, V], or, where `places` says which
    is each node's, those of some nodes [1, N, V]. Each emitted token was chosen at its node of the
    accepted path.
    """
    width = accepted.emitted.shape[1]
    batch, alternatives = accepted.path.shape[0], record.top.shape[2]

    def nothing(raw):
        shape = (batch, width, alternatives)
        return Measured(
            jnp.zeros((batch, width), jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros(shape, jnp.int32),
        )

    def of_tokens(raw):
        total = jax.nn.logsumexp(raw, axis=-1)
        top, ids = jax.lax.top_k(raw, alternatives)
        if places is None:
            at = jnp.arange(batch)[:, None], accepted.path
        else:
            at = 0, jnp.take_along_axis(places, accepted.path, axis=1)
        chosen = raw[*at, jnp.maximum(accepted.emitted, 0)]
        return Measured(chosen - total[at], top[at] - total[at][..., None], ids[at])

    return jax.lax.cond(record.asked.any(), of_tokens, nothing, raw)


def written(record: LogprobRecord, measured: Measured, at: Int[Array, "B P"]) -> LogprobRecord:
    """The record with a step's tokens in the places `at`; those beyond its room are dropped."""
    rows = jnp.arange(at.shape[0])[:, None]
    at = jnp.where(record.asked[:, None], at, record.chosen.shape[1])

    def put(whole, new):
        return whole.at[rows, at].set(new, mode="drop")

    return dataclasses.replace(
        record,
        chosen=put(record.chosen, measured.chosen),
        top=put(record.top, measured.top),
        top_ids=put(record.top_ids, measured.top_ids),
    )


@jax.jit
def row_of(record: LogprobRecord, row: Int[Array, ""]) -> LogprobRecord:
    """One row of a record, as a batch of one."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, row, 1, 0), record)


def on_host(record: LogprobRecord, row: int) -> Logprobs:
    """Row `row` as NumPy arrays, with all of its room."""
    one = jax.device_get(row_of(record, jnp.asarray(row, jnp.int32)))
    return Logprobs(chosen=one.chosen[0], top=one.top[0], top_ids=one.top_ids[0])
