"""What a block attends to besides itself: one layer of a cache, copied or read in place."""

import dataclasses
from typing import NamedTuple

import jax
from jax.typing import DTypeLike

from lookahead_jax.kernels.common import Slots
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.quantization import dequantize_entries


class Context(NamedTuple):
    """Keys and values that a block attends to besides its own, in one layer."""

    k: jax.Array  # [B, K, S, H], or with `layer` a stack [L, B, K, S, H]
    v: jax.Array
    pos: jax.Array  # [B, K or 1, S] int32, -1 = empty
    slots: Slots | None = None  # range worth reading
    layer: jax.Array | None = None  # int32 scalar: the layer to read, if k and v are stacks
    scales: tuple[jax.Array, jax.Array] | None = None  # of int8 k and v, [B, K, S] float32
    shared: "Context | None" = None  # of B / n rows: row b also attends to row b // n there


def stored_layer(cache: KVCache, layer: jax.Array) -> KVCache:
    """One layer of the cache as it is stored: its arrays without the axis L.

    Raises ValueError for a cache that branches from another: it cannot be scored or cut.
    """
    if cache.shared is not None:
        raise ValueError("a cache that branches from another cannot be cut: cut before branching")
    layered = {
        name: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False)
        for name in ("k", "v", "pos", "length", "k_scale", "v_scale")
        if (a := getattr(cache, name)) is not None
    }
    return dataclasses.replace(cache, **layered)


def cache_context(cache: KVCache, layer: jax.Array, dtype: DTypeLike) -> Context:
    """One layer of the cache as a context; only its filled slots are read.

    Entries of an int8 cache are floats of `dtype` there: a cut scores them one layer at a time.
    """
    here = stored_layer(cache, layer)
    k, v = here.k, here.v
    if here.k_scale is not None and here.v_scale is not None:
        k = dequantize_entries(k, here.k_scale, dtype)
        v = dequantize_entries(v, here.v_scale, dtype)
    return Context(k, v, here.pos, (0, here.length))


def cache_in_place(cache: KVCache, layer: jax.Array) -> Context:
    """`cache_context` without a copy: attention reads the layer in the stack."""

    def at(a):
        return jax.lax.dynamic_index_in_dim(a, layer, keepdims=False)

    scales = None
    if cache.k_scale is not None and cache.v_scale is not None:
        scales = at(cache.k_scale), at(cache.v_scale)
    shared = None if cache.shared is None else cache_in_place(cache.shared, layer)
    return Context(cache.k, cache.v, at(cache.pos), (0, at(cache.length)), layer, scales, shared)
