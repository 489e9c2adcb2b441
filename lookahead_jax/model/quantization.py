"""Weights and cache entries in eight bits: rounded values with float32 scales.

A weight has one scale per output channel, applied to the product, so that it is never turned back
into floats as a whole. A key or value has one scale per slot and KV head.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

TABLE_ROWS = {"cpu": 1024, "cuda": 4096}  # rows of a table that are floats at once
LARGEST = 127  # symmetric: -128 is not used

FINGERPRINT_SAMPLES = 256  # per parameter and layer; changing it changes every fingerprint


@struct.dataclass
class QuantizedWeight:
    """A matrix as `values * scale`, where the scale has the axes of the outputs.

    It stands in the parameter tree where the matrix would stand, so layers can be stacked, scanned
    and sliced as usual. It has the shape of the matrix, and the dtype that its products have.
    """

    values: jax.Array  # int8, the shape of the matrix
    scale: jax.Array  # float32, the shape of its outputs, with the layer axis if it is stacked
    sample: jax.Array  # [(L,) samples] some values before rounding, for its fingerprint

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def size(self) -> int:
        return self.values.size

    @property
    def dtype(self) -> np.dtype:
        """Of activations: what the matrix would have without rounding."""
        return self.sample.dtype

    @property
    def sharding(self) -> jax.sharding.Sharding:
        return self.values.sharding


Weight = jax.Array | QuantizedWeight


def quantize(matrix: np.ndarray, inputs: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """int8 values and float32 scales of a matrix whose axes `inputs` are contracted in products.

    Symmetric: the largest magnitude of an output channel becomes 127. A channel of zeros has scale
    0; one with NaN or infinity has a scale that is not finite, so its outputs are not finite.
    """
    matrix = matrix.astype(np.float32)
    scale = np.abs(matrix).max(axis=inputs, keepdims=True) / np.float32(LARGEST)
    divisor = np.where(np.isfinite(scale) & (scale > 0), scale, np.float32(np.inf))
    with np.errstate(invalid="ignore"):
        values = np.nan_to_num(matrix / divisor, nan=0.0)
    return np.rint(values).astype(np.int8), scale.squeeze(inputs)


def quantize_entries(entries: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys or values [..., H] as int8 [..., H] and their float32 scales [...].

    Symmetric: the largest magnitude of an entry becomes 127. The scale of an entry with NaN or
    infinity is NaN, so that what reads it is NaN, too.
    """
    entries = entries.astype(jnp.float32)
    largest = jnp.abs(entries).max(-1)  # XLA on CPU ignores NaN in a maximum
    scale = jnp.where(jnp.isfinite(entries).all(-1), largest / LARGEST, jnp.nan)
    divisor = jnp.where(scale > 0, scale, 1.0)[..., None]
    return jnp.round(entries / divisor).astype(jnp.int8), scale


def dequantize_entries(values: jax.Array, scale: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The keys or values that `quantize_entries` rounded, in `dtype`."""
    return (values.astype(jnp.float32) * scale[..., None]).astype(dtype)


def rows_of(table: Weight, ids: jax.Array | slice) -> jax.Array:
    """Rows `ids` [..., P] of a table [V, D], in the table's dtype."""
    if not isinstance(table, QuantizedWeight):
        return table[ids]
    if not isinstance(ids, slice) and ids.size == 1:
        # For one row XLA on TPU slices, and copies an int8 table into another layout for that.
        return rows_of(table, jnp.concatenate([ids, ids], axis=-1))[..., :1, :]
    rows = table.values[ids].astype(jnp.float32) * table.scale[ids][..., None]
    return rows.astype(table.dtype)


def multiply(
    x: jax.Array, weight: QuantizedWeight, axes: tuple[Sequence[int], Sequence[int]]
) -> jax.Array:
    """`x` times a matrix, contracting `axes` of both, summed in float32; float32.

    The other axes of the matrix are its outputs, and the last axes of the result. The conversion of
    the values belongs to the product: XLA reads int8 from memory.
    """
    product = jax.lax.dot_general(
        x, weight.values.astype(x.dtype), (axes, ((), ())), preferred_element_type=jnp.float32
    )
    lead = product.ndim - weight.scale.ndim
    return product * weight.scale.reshape((1,) * lead + weight.scale.shape)


def multiply_table(x: jax.Array, table: QuantizedWeight) -> jax.Array:
    """`x` [B, P, D] times the rows of a table [V, D]: float32 [B, P, V].

    XLA on CPU and GPU converts a table in memory before it multiplies; a block stays in the caches.
    """

    def whole(x, table):
        return multiply(x, table, ((2,), (1,)))

    def in_blocks(x, table, most):
        shards = math.prod(jax.sharding.get_abstract_mesh().axis_sizes)
        sizes = (n for n in range(shards, most + 1, shards) if table.shape[0] % n == 0)
        size = max(sizes, default=0)
        if size < most // 16:
            return whole(x, table)
        # Block j has the rows i * count + j: the leading axis, a multiple of the number of devices,
        # keeps the table's sharding, so that nothing is gathered.
        count = table.shape[0] // size
        values = table.values.reshape(size, count, table.shape[1])
        scale = table.scale.reshape(size, count)

        def multiplied(j):
            at = partial(jax.lax.dynamic_index_in_dim, index=j, axis=1, keepdims=False)
            return whole(x, QuantizedWeight(at(values), at(scale), table.sample))

        parts = jax.lax.map(multiplied, jnp.arange(count, dtype=jnp.int32))
        return jnp.moveaxis(parts, 0, -1).reshape(*x.shape[:2], -1)

    forms = {name: partial(in_blocks, most=rows) for name, rows in TABLE_ROWS.items()}
    return jax.lax.platform_dependent(x, table, **forms, default=whole)
