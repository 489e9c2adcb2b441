"""Blocks of keys in TPU kernels: their sizes, layout and bounds, and the logits of one block."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lookahead_jax.kernels.common import LANES, LOG2E, NEVER

BLOCK_BYTES = 1 << 20  # of keys in a grid step, chosen from the compiler's static schedule


def unsupported(q: jax.Array, k: jax.Array, *, int8: bool = False) -> str | None:
    """Why the kernels do not support these arguments, or None; `int8`: these keys are read, too."""
    total, head_dim = k.shape[-2:]
    if head_dim % 64:
        return f"head dim {head_dim} is not a multiple of 64"
    if total % 128:
        return f"{total} keys are not a multiple of 128"
    matching = k.dtype == q.dtype or (int8 and k.dtype == jnp.int8)
    if q.dtype not in (jnp.bfloat16, jnp.float32) or not matching:
        return f"queries {q.dtype} and keys {k.dtype} are not both bfloat16 or float32"
    return None


def pad_axis(a: jax.Array, axis: int, multiple: int, value: int = 0) -> jax.Array:
    """`a` with an axis padded to a multiple."""
    grow = [(0, 0)] * a.ndim
    grow[axis] = (0, -a.shape[axis] % multiple)
    return jnp.pad(a, grow, constant_values=value)


def block_size(k: jax.Array, key_block: int | None) -> int:
    """Keys of a grid step: about BLOCK_BYTES of them, a multiple of 128, at most all."""
    most = BLOCK_BYTES // (k.shape[3] * k.dtype.itemsize) if key_block is None else key_block
    return min(max(most // 128, 1) * 128, k.shape[2])


def live(bounds_ref, block, size: int):
    """Whether a block of keys holds any slot worth reading for this grid step's row and head."""
    at = 2 * (pl.program_id(0) * pl.num_programs(1) + pl.program_id(1))
    first, last = bounds_ref[at], bounds_ref[at + 1]
    return (block * size < last) & ((block + 1) * size > first)


def read_at(bounds_ref, row, block, *, size: int):
    """The block to copy for `row` (batch * heads + head): `block`, clamped to the live ones.

    Pallas does not copy a block again that is in memory already, so dead blocks cost no copy.
    """
    at = 2 * row
    last = jax.lax.div(jnp.maximum(bounds_ref[at + 1] - 1, 0), size)
    return jnp.clip(block, jnp.minimum(jax.lax.div(bounds_ref[at], size), last), last)


def as_stored(a: jax.Array) -> jax.Array:
    """Keys or values [..., S, H] in XLA's own layout: slots last if H is below 128 lanes.

    The transposition then only renames axes. Without it XLA would make a padded copy.
    """
    return a.swapaxes(-1, -2) if a.shape[-1] < LANES else a


def slots_spec(dim: int, size: int, lead: int, at) -> pl.BlockSpec:
    """A block of `size` slots of an array in the layout of `as_stored`.

    `at` returns the place on the `lead` leading axes, then the number of the block.
    """
    if dim >= LANES:
        return pl.BlockSpec((*[None] * lead, size, dim), lambda *ids: (*at(*ids), 0))

    def transposed(*ids):
        *place, block = at(*ids)
        return *place, 0, block

    return pl.BlockSpec((*[None] * lead, dim, size), transposed)


def masked_logits(q, k, k_pos, q_pos, window, *, scale, softcap, k_scale=None):
    """Logits [R, S] of one tile on one block, float32 in units of log(2), and their mask.

    Keys are [S, H], or [H, S] if they are stored so; `k_scale` [1, S] belongs to int8 keys. The
    hardware computes powers of two: exp(x - lse) would cost one more multiplication per element.
    """
    raw = jax.lax.dot_general(
        q, k.astype(q.dtype), (((1,), (1 if k.shape[1] == q.shape[1] else 0,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
    )  # fmt: skip
    raw = raw if k_scale is None else raw * k_scale
    if softcap is None:
        logits = raw * (scale * LOG2E)
    else:
        logits = (softcap * LOG2E) * jnp.tanh(raw * (scale / softcap))
    k_pos = jnp.where(k_pos < 0, NEVER, k_pos)
    seen = k_pos <= q_pos
    if window is not None:
        seen &= k_pos > q_pos - window
    return logits, seen
