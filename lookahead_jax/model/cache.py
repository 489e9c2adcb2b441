"""The key-value cache: a fixed number of slots per layer and KV head, each with its position.

Heads and layers keep different entries, so positions are stored per slot. Masks are computed from
these positions, never from the order of the slots. Filled slots come first; `length` counts them.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.jit import check_not_donated

CacheType = Literal["int8"]
SLOT_MULTIPLE = 128  # lanes of a TPU register; the kernels need a multiple of it


@struct.dataclass
class KVCache:
    """Keys and values of the tokens that have been read.

    Stored keys are already rotated, so a row keeps its RoPE factors. Factors that depend on length
    are chosen from `rope_span` (see model/rope.py). In an int8 cache an entry is its values times
    its scale. Rows that branch from a prompt read its entries in `shared` and write their own here.
    """

    k: jax.Array  # [L, B, K, S, H]
    v: jax.Array  # [L, B, K, S, H]
    pos: jax.Array  # [L, B, K, S] int32 position held by each slot, -1 if empty
    length: jax.Array  # [L, B, K] int32 entries written; above S, the excess was dropped
    next_pos: jax.Array  # [B] int32 position of the next token
    rope_span: jax.Array  # [B] int32
    k_scale: jax.Array | None = None  # [L, B, K, S] float32, where k is int8
    v_scale: jax.Array | None = None  # [L, B, K, S] float32, where v is int8
    shared: "KVCache | None" = (
        None  # of B / n rows: row b also sees the entries of row b // n there
    )
    concurrent: bool = struct.field(pytree_node=False, default=False)  # those n see one another's

    @property
    def slots(self) -> int:
        """Slots per layer and KV head."""
        return self.k.shape[3]

    @property
    def overflowed(self) -> jax.Array:
        """bool [B]: rows that have lost entries because their slots were full."""
        return (self.length > self.slots).any((0, 2))

    @property
    def free(self) -> jax.Array:
        """int32 [B]: tokens that still fit into every layer and head; below 0 once overflowed."""
        return self.slots - self.length.max((0, 2))

    @property
    def bytes(self) -> int:
        """Bytes allocated for keys, values, their scales and positions, over all devices.

        Those of `shared` are included.
        """
        arrays = (self.k, self.v, self.k_scale, self.v_scale, self.pos)
        own = sum(a.size * a.dtype.itemsize for a in arrays if a is not None)
        return own if self.shared is None else own + self.shared.bytes

    def fork(self, copies: int) -> "KVCache":
        """A new cache with each row repeated `copies` times: one prompt, several continuations.

        `fork(1)` is a copy that survives a call which donates the original. Raises ValueError for
        fewer than one copy and for a cache that was donated already.
        """
        if copies < 1:
            raise ValueError(f"copies must be at least 1, not {copies}")
        check_not_donated("fork", self)

        return self.map_rows(lambda a, axis: jnp.repeat(a, copies, axis=axis))

    def map_rows(self, change: Callable[[jax.Array, int], jax.Array]) -> "KVCache":
        """A cache whose arrays are `change(array, axis of the rows)`; `shared` stays as it is."""
        by_layer = ("k", "v", "pos", "length", "k_scale", "v_scale")
        arrays = {name: getattr(self, name) for name in by_layer}
        return dataclasses.replace(
            self,
            **{name: None if a is None else change(a, 1) for name, a in arrays.items()},
            next_pos=change(self.next_pos, 0),
            rope_span=change(self.rope_span, 0),
        )

    def branch(
        self, copies: int, *, slots: int, layers: int | None = None, concurrent: bool = False
    ) -> "KVCache":
        """A new cache of `copies` rows for each row, all of which read the entries of that row.

        Nothing is copied: this cache becomes the `shared` part of the new one, and what the new
        rows write goes into `slots` of their own (rounded up to a multiple of SLOT_MULTIPLE). The
        memory is that of this cache, once, and of the slots of each row; with `layers`, these are
        slots of the first so many layers only. `concurrent` rows of a prompt also read what the
        others write (model/concurrent.py). A call that donates the new cache donates this one with
        it. Raises ValueError for fewer than one copy, for a cache that branches already, and for
        one that was donated.
        """
        if copies < 1:
            raise ValueError(f"copies must be at least 1, not {copies}")
        if self.shared is not None:
            raise ValueError("this cache branches from another one: fork it instead")
        check_not_donated("branch", self)
        whole, batch, heads, _, dim = self.k.shape
        return _empty(
            (layers or whole, batch * copies, heads, round_up(slots, SLOT_MULTIPLE)),
            dim,
            self.k.dtype,
            jnp.repeat(self.next_pos, copies),
            jnp.repeat(self.rope_span, copies),
            shared=self,
            concurrent=concurrent,
        )


def cache_type(cache_dtype: str | None) -> CacheType | None:
    """The checked option `cache_dtype`; ValueError for an unknown value."""
    if cache_dtype is None:
        return None
    if cache_dtype != "int8":
        raise ValueError(f"cache_dtype={cache_dtype!r} is unknown: give 'int8', or leave it out")
    return "int8"


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


def empty_cache(
    config: ModelConfig, batch: int, slots: int, dtype: DTypeLike, rope_span: jax.Array
) -> KVCache:
    """An empty cache of `batch` rows; `slots` is rounded up to a multiple of SLOT_MULTIPLE.

    With dtype int8 it has scales.
    """
    shape = (config.num_layers, batch, config.num_kv_heads, round_up(slots, SLOT_MULTIPLE))
    return _empty(shape, config.head_dim, dtype, jnp.zeros(batch, jnp.int32), rope_span)


def _empty(
    shape: tuple[int, int, int, int],  # L, B, K, S
    head_dim: int,
    dtype: DTypeLike,
    next_pos: jax.Array,
    rope_span: jax.Array,
    *,
    shared: KVCache | None = None,
    concurrent: bool = False,
) -> KVCache:
    scaled = jnp.dtype(dtype) == jnp.int8
    return KVCache(
        k_scale=jnp.zeros(shape, jnp.float32) if scaled else None,
        v_scale=jnp.zeros(shape, jnp.float32) if scaled else None,
        k=jnp.zeros((*shape, head_dim), dtype),
        v=jnp.zeros((*shape, head_dim), dtype),
        pos=jnp.full(shape, -1, jnp.int32),
        length=jnp.zeros(shape[:3], jnp.int32),
        next_pos=next_pos,
        rope_span=rope_span,
        shared=shared,
        concurrent=concurrent,
    )


@partial(jax.jit, static_argnames=("slots",))
def widened(cache: KVCache, *, slots: int) -> KVCache:
    """A copy of a cache with more slots, the new ones empty."""
    spare = [(0, 0)] * 3 + [(0, slots - cache.slots)]
    wide = dataclasses.replace(
        cache,
        k=jnp.pad(cache.k, [*spare, (0, 0)]),
        v=jnp.pad(cache.v, [*spare, (0, 0)]),
        pos=jnp.pad(cache.pos, spare, constant_values=-1),
        k_scale=None if cache.k_scale is None else jnp.pad(cache.k_scale, spare),
        v_scale=None if cache.v_scale is None else jnp.pad(cache.v_scale, spare),
    )
    return jax.tree.map(jnp.copy, wide)  # an unchanged array would be the caller's own


class Entries(NamedTuple):
    """Keys and values of a block that has been run, and which of its rows to keep."""

    k: jax.Array  # [L, B, K, P, H]
    v: jax.Array  # [L, B, K, P, H]
    positions: jax.Array  # [B, P] int32
    path: jax.Array  # [B, P] int32 rows of the block to keep, in order
    count: jax.Array  # [B] int32 how many entries of `path` are valid
    k_scale: jax.Array | None = None  # [L, B, K, P] float32, for an int8 cache
    v_scale: jax.Array | None = None  # [L, B, K, P] float32


def commit(cache: KVCache, entries: Entries) -> KVCache:
    """Appends the accepted rows of a block to the cache; rejected rows leave no trace.

    Plain decoding keeps row 0, a prompt chunk its valid rows, a verified draft the accepted path.
    Entries beyond the last slot are dropped. `length` counts them all the same, so `overflowed`
    reports the loss.
    """
    positions, path, count = entries.positions, entries.path, entries.count
    layers, batch, heads, width = entries.k.shape[:4]
    new_pos = jnp.take_along_axis(positions, path, axis=1)

    # Index all leading axes explicitly: for a scatter with a slice in the middle XLA copies the
    # whole cache (measured for TPU: 2.5 GB of temporaries instead of 0.2 GB).
    li = jnp.arange(layers)[:, None, None, None]
    bi = jnp.arange(batch)[None, :, None, None]
    hi = jnp.arange(heads)[None, None, :, None]
    step = jnp.arange(width)[None, None, None, :]
    accepted = step < count[None, :, None, None]
    si = jnp.where(accepted, cache.length[..., None] + step, cache.slots)
    li, bi, hi, si = jnp.broadcast_arrays(li, bi, hi, si)

    def put(buffer, rows):
        return buffer.at[li, bi, hi, si].set(rows.astype(buffer.dtype), mode="drop")

    def append(buffer, rows):
        if buffer is None:
            return None
        taken = path.reshape(1, batch, 1, width, *[1] * (rows.ndim - 4))
        return put(buffer, jnp.take_along_axis(rows, taken, axis=3))

    return dataclasses.replace(
        cache,
        k=append(cache.k, entries.k),
        v=append(cache.v, entries.v),
        k_scale=append(cache.k_scale, entries.k_scale),
        v_scale=append(cache.v_scale, entries.v_scale),
        pos=put(cache.pos, jnp.broadcast_to(new_pos[None, :, None, :], li.shape)),
        length=cache.length + count[None, :, None],
        next_pos=cache.next_pos + count,
    )
