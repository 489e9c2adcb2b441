"""Checks on the host before a cache grows: it exists, the tokens fit, the RoPE factors stay valid.

They read a few integers from the device. Public functions call them once, before they start the
device; loops over decoding steps never do.
"""

import jax
import numpy as np

from lookahead_jax.host.warn import warn
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.jit import check_not_donated, is_traced
from lookahead_jax.model.rope import rope_boundary


def check_growth(
    name: str, cache: KVCache, new_tokens: jax.Array | int, *, config: ModelConfig
) -> None:
    """Checks that function `name` may append `new_tokens` (int or [B]) to every row of a cache.

    Does nothing under jit, or where this process holds only a part of the cache. Raises
    ValueError for a cache that was donated before, and for rows without enough free slots. Warns
    about rows that would grow past the length at which RoPE factors change.
    """
    if is_traced((cache, new_tokens)):
        return
    check_not_donated(name, cache)
    if not getattr(cache.length, "is_fully_addressable", True):
        return
    check_fit(name, cache, new_tokens)
    known, read = np.asarray(cache.rope_span), np.asarray(cache.next_pos)
    warn_of_crossing(known, read + np.asarray(new_tokens), config=config)


def check_fit(
    name: str, cache: KVCache, new_tokens: jax.Array | np.ndarray | np.integer | int
) -> None:
    """Raises ValueError unless every row has free slots for its `new_tokens` (int or [B])."""
    free, new = np.broadcast_arrays(
        cache.slots - np.asarray(cache.length).max((0, 2)), np.asarray(new_tokens)
    )
    if (short := np.flatnonzero(new > free)).size:
        row = int(short[0])
        raise ValueError(
            f"{name}: row {row} has {max(int(free[row]), 0)} free slots of {cache.slots} and needs "
            f"{int(new[row])}: prefill with a larger slots or new_tokens (lk.slots_for), or add "
            "fewer tokens"
        )


def warn_of_crossing(
    known: np.ndarray | list[int],
    total: np.ndarray | list[int],
    *,
    config: ModelConfig,
) -> None:
    """Warns if a row whose RoPE factors were chosen from `known` tokens outgrows their range."""
    boundary = rope_boundary(config)
    if boundary is None:
        return
    known, total = np.broadcast_arrays(np.asarray(known), np.asarray(total))
    crossed = np.flatnonzero((known <= boundary) & (total > boundary))
    if crossed.size:
        row = int(crossed[0])
        warn(
            f"row {row} grows from {int(known[row])} to up to {int(total[row])} tokens, past the "
            f"{boundary} at which this model's RoPE factors change. The row keeps the factors "
            "chosen from the tokens read first; output beyond that length is less reliable",
        )
