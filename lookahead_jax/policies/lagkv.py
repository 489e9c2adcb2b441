"""lagkv: keys and values are compared with the range of those that follow (arXiv 2504.04704)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from lookahead_jax.policies.base import CutByEntries, Policy, protected_share
from lookahead_jax.policies.view import LayerView


@dataclasses.dataclass(frozen=True, kw_only=True)
class LagKV(Policy):
    """Keeps entries whose channels vary most, relative to the range of the entries that follow.

    The entries after the sinks form partitions of `lag_size`. Each channel of keys and values is
    normalised by its minimum and maximum in the next partition (0 if it is constant there). An
    entry scores the standard deviation over its channels, softmax over the partition, mean of keys
    and values. What has no next partition, the last `lag_size` to 2 `lag_size` - 1 entries, is
    always kept, the newest first if the budget is smaller.
    """

    lag_size: int = 128
    """Entries of a partition."""
    n_sink: int = 4
    """First prompt tokens, always kept."""
    compare: Literal["partition", "prompt"] = "partition"
    """partition: scores are ranks within it, so all keep equally many; prompt: as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag_size < 1 or self.n_sink < 0:
            raise ValueError(
                f"lag_size={self.lag_size} must be at least 1 and n_sink={self.n_sink} not negative"
            )

    @property
    def decode_cut(self) -> CutByEntries:
        return CutByEntries()

    def notice(self, budget: int) -> str | None:
        if protected_share(self.n_sink, budget) + self.lag_size < budget:
            return None
        return (
            f"lag_size {self.lag_size} leaves budget {budget} to sinks and the most recent entries"
        )

    def score(self, view: LayerView) -> jax.Array:
        order, _, last = self._partitions(view.pos)
        pick = jnp.broadcast_to(order, view.k.shape[:3])[..., None]
        of_keys, of_values = (
            _lagged_deviation(self._split(jnp.take_along_axis(entries, pick, axis=2)))
            for entries in (view.k, view.v)
        )
        scores = (jax.nn.softmax(of_keys, axis=-1) + jax.nn.softmax(of_values, axis=-1)) / 2
        if self.compare == "partition":
            scores = jnp.argsort(jnp.argsort(scores, axis=-1), axis=-1).astype(jnp.float32)
            scores = scores / self.lag_size
        scores = scores.reshape(*scores.shape[:2], -1)  # of the ordered entries, without the tail
        place = jnp.argsort(order, axis=-1)
        at = jnp.broadcast_to(jnp.minimum(place, scores.shape[-1] - 1), view.k.shape[:3])
        scores = jnp.take_along_axis(scores, at, axis=-1)
        newest = 1.0 + jnp.maximum(view.pos, 0).astype(jnp.float32)
        return jnp.where(place < last, scores, newest)

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        sinks = protected_share(self.n_sink, budget)
        order, count, last = self._partitions(pos)
        place = jnp.argsort(order, axis=-1)
        tail = (place >= jnp.maximum(last, count - (budget - sinks))) & (place < count)
        return tail | ((pos >= 0) & (pos < sinks))

    def _partitions(self, pos: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Entries after the sinks by position, how many there are, and how many have scores.

        int32 [B, K or 1, T], [B, K or 1, 1] and [B, K or 1, 1].
        """
        behind = pos >= self.n_sink
        order = jnp.argsort(jnp.where(behind, pos, jnp.iinfo(jnp.int32).max), axis=-1)
        count = behind.sum(-1, keepdims=True, dtype=jnp.int32)
        whole = count // self.lag_size
        return order, count, jnp.maximum(whole - 1, 0) * self.lag_size

    def _split(self, entries: jax.Array) -> jax.Array:
        """[B, K, T, H] -> partitions float32 [B, K, n, lag_size, H], two or more of them."""
        tokens = entries.shape[2]
        room = max(2, -(-tokens // self.lag_size)) * self.lag_size - tokens
        entries = jnp.pad(entries.astype(jnp.float32), [(0, 0), (0, 0), (0, room), (0, 0)])
        return entries.reshape(*entries.shape[:2], -1, self.lag_size, entries.shape[-1])


def _lagged_deviation(parts: jax.Array) -> jax.Array:
    """[B, K, n, lag, H] -> [B, K, n - 1, lag], standard deviation over the normalised channels."""
    low, high = (f(parts[:, :, 1:], axis=3, keepdims=True) for f in (jnp.min, jnp.max))
    spread = high - low
    known = spread > 0
    normed = jnp.where(known, (parts[:, :, :-1] - low) / jnp.where(known, spread, 1.0), 0.0)
    return normed.std(-1, ddof=1)
