# pyright: reportPrivateImportUsage=false
"""Blocks of keys in Mosaic GPU kernels: their layouts and copies, and the logits of one block."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from lookahead_jax.kernels.common import LOG2E

KEYS = 64  # slots of a block
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

# Layouts are explicit: jax 0.12 cannot infer them for these kernels.
PARAMETERS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
    """Why the kernels do not support these arguments, or None."""
    total, head_dim = k.shape[-2:]
    if head_dim not in (64, 128):
        return f"head dim {head_dim} is neither 64 nor 128"
    if total % KEYS:
        return f"{total} keys are not a multiple of {KEYS}"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        return f"queries {q.dtype} and keys {k.dtype} are not both bfloat16 or float16"
    return None


def tiled(dtype: Any) -> tuple[Any, Any]:
    """The shared-memory layout that tensor cores read: rows of 128 bytes, swizzled."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def read_shared(ref: Any, layout: Any) -> jax.Array:
    """A shared-memory vector in a register layout; jax before 0.11 needs an index."""
    read: Any = plgpu.load
    index = inspect.signature(read).parameters.get("idx")
    index = ((),) if index is not None and index.default is inspect.Parameter.empty else ()
    return read(ref, *index, layout=layout)


def fetch(pairs: Any, barrier: Any) -> None:
    """Starts all copies from global to shared memory, then waits for them.

    The barrier expects one arrival per copy.
    """
    for source, target in pairs:
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def logits_of(raw: jax.Array, scale: float, softcap: float | None) -> jax.Array:
    """Logits in units of log(2): the hardware computes powers of two."""
    if softcap is None:
        return raw * (scale * LOG2E)
    return (softcap * LOG2E) * jnp.tanh(raw * (scale / softcap))


def visible(k_pos: jax.Array, low: jax.Array, high: jax.Array, shape: Any, keys: int) -> jax.Array:
    """low < k_pos <= high for every pair; `keys` is the axis of `shape` that counts keys."""
    k_pos = lax.broadcast_in_dim(k_pos, shape, [keys])
    low, high = (lax.broadcast_in_dim(a, shape, [1 - keys]) for a in (low, high))
    return (k_pos <= high) & (k_pos > low)


def row_range(q_pos: jax.Array, window: Any) -> tuple[jax.Array, jax.Array]:
    """Positions that a row sees, low exclusive and high inclusive; int32 like `q_pos`."""
    low = jnp.full_like(q_pos, -1) if window is None else jnp.maximum(q_pos - window, -1)
    return low, q_pos
