"""Bytes of a cache's entries, and how many entries fit into the bytes of a budget."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import lookahead_jax as lk
from lookahead_jax.eval.frontier.config import CacheName
from lookahead_jax.eval.grid.config import model_folder
from lookahead_jax.model.cache import SLOT_MULTIPLE, empty_cache
from lookahead_jax.model.config import ModelConfig


class CacheSizes(NamedTuple):
    """What the entries of a model's caches take."""

    heads: int  # layers times KV heads
    entry: Mapping[CacheName, int]  # bytes of one entry in one layer and KV head

    def budget(self, entries: int) -> int:
        """Bytes per layer and KV head of so many entries of the float cache."""
        return entries * self.entry["float"]

    def kept(self, entries: int, cache: CacheName) -> int:
        """The most entries of a cache that fit into these bytes."""
        return self.budget(entries) // self.entry[cache]

    def slots(self, row: Mapping[str, Any], cache: CacheName) -> int:
        """Slots that a row's cache had per layer and KV head.

        Raises ValueError if its bytes are not those of such slots.
        """
        each = row["batch"] * self.heads * self.entry[cache]
        slots, rest = divmod(row["cache_bytes"], each)
        if rest:
            raise ValueError(
                f"{row['file']}, line {row['line']}: a cache of {row['cache_bytes']} bytes is none "
                f"of entries of {self.entry[cache]} bytes; choose another folder"
            )
        return slots


def entry_bytes(config: ModelConfig, dtype: DTypeLike) -> int:
    """Bytes of one entry in one layer and KV head: key, value, their scales and the position."""

    def make(rope_span: jax.Array):
        return empty_cache(config, 1, SLOT_MULTIPLE, dtype, rope_span)

    # Of the cache only the shapes are made: its own count of bytes needs no more.
    cache = jax.eval_shape(make, jax.ShapeDtypeStruct((1,), jnp.int32))
    return cache.bytes // (cache.slots * config.num_layers * config.num_kv_heads)


def sizes_of(model: str, dtype: str | None) -> CacheSizes:
    """The sizes for a model, which is loaded for the type of its weights."""
    loaded = lk.load(model_folder(model), dtype=dtype)
    config, weights = loaded.config, loaded.params["embed"].dtype
    return CacheSizes(
        config.num_layers * config.num_kv_heads,
        {"float": entry_bytes(config, weights), "int8": entry_bytes(config, jnp.int8)},
    )
