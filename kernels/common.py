"""What the kernels share: constants, masks from positions, and sweeps over blocks of keys.

Letters: B batch, P (or M) rows of a block, N query heads, K KV heads, G = N / K, H head dim,
S (or T) slots.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.dispatch import target_platform

# The running row maximum starts here. Masked logits are -inf, so a row that sees nothing keeps
# this finite maximum, collects no mass, and comes out as zeros instead of NaN.
FLOOR = -1e30
NEVER = jnp.iinfo(jnp.int32).max  # position of an empty slot, as the kernels compare it
LOG2E = 1.0 / math.log(2.0)
LANES = 128  # of a TPU vector register
KEY_BLOCK = 512
_LOGIT_BYTES = 1 << 28
Slots = tuple[jax.Array | int, jax.Array | int]  # half-open range; arrays are scalars or [B, K]


class Own(NamedTuple):
    """A block's own keys and values, and which of its rows see which."""

    k: jax.Array  # [B, K, P, H]
    v: jax.Array  # [B, K, P, H]
    visible: jax.Array  # [B, P, P] bool, row i sees column j
    scales: tuple[jax.Array, jax.Array] | None = None  # of int8 k and v, [B, K, P] float32


class Scales(NamedTuple):
    """Factors of int8 keys and values: float32, one for each entry and KV head."""

    own_k: jax.Array  # [B, K, P]
    own_v: jax.Array  # [B, K, P]
    k: jax.Array  # [B, K, S]
    v: jax.Array  # [B, K, S]


class Places(NamedTuple):
    """Positions, masks and bounds of a kernel call: all that has no gradient."""

    q_pos: jax.Array  # [B, P] int32, -1 = no query
    k_pos: jax.Array  # [B, K or 1, S] int32, -1 = empty slot
    own_seen: jax.Array | None  # [B, P, P] int8, which of their own keys the rows see
    bounds: jax.Array  # [B * K * 2] int32 first slot worth reading and one past the last
    window: jax.Array | None  # int32 scalar
    layer: jax.Array | None = None  # int32 scalar, where the context is a stack of layers
    valid: jax.Array | None = None  # [B, K or 1, S] bool, entries that take part in the pooling
    scales: Scales | None = None  # of int8 keys and values


def softcap_logits(logits: jax.Array, softcap: float | None) -> jax.Array:
    """softcap * tanh(logits / softcap), as in Gemma 2; unchanged if softcap is None."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def with_sinks(
    out: jax.Array,  # [B, P, N, H]
    lse: jax.Array,  # [B, N, P] float32
    sinks: jax.Array | None,  # [N]
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of attention as if each row also saw a key without a value.

    A sink is the logit of that key, one per query head (gpt-oss). It takes its share of the
    softmax: out' = out * exp(lse) / (exp(lse) + exp(sink)). A row that sees nothing else stays 0.
    """
    if sinks is None:
        return out, lse
    sink = sinks.astype(jnp.float32)[None, :, None]
    share = jax.nn.sigmoid(lse - sink).swapaxes(1, 2)[..., None]
    return (out.astype(jnp.float32) * share).astype(out.dtype), jnp.logaddexp(lse, sink)


def joined(*parts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over several sets of keys, from the output and log-sum-exp [B, N, P] of each.

    out = sum_i out_i * exp(lse_i) / sum_i exp(lse_i). A row that sees nothing in any stays 0.
    """
    whole = functools.reduce(jnp.logaddexp, [lse for _, lse in parts])
    seen = whole > -jnp.inf

    def share(part):
        return jnp.where(seen, jnp.exp(part - jnp.where(seen, whole, 0.0)), 0.0).swapaxes(1, 2)

    mixed = [out.astype(jnp.float32) * share(lse)[..., None] for out, lse in parts]
    mixed = functools.reduce(jnp.add, mixed)
    return mixed.astype(parts[0][0].dtype), whole


def visible_by_position(
    q_pos: jax.Array,  # [B, P] int32, -1 = no query
    k_pos: jax.Array,  # [B, K or 1, S] int32, -1 = empty slot
    window: jax.Array | int | None,
) -> jax.Array:
    """Which queries see which keys, from their positions: bool [B, K or 1, P, S].

    A key is visible if its slot is filled, it is not in the query's future, and its distance is
    below `window` positions (None: no window).
    """
    q = q_pos[:, None, :, None]
    k = k_pos[:, :, None, :]
    seen = (k >= 0) & (k <= q)
    return seen if window is None else seen & (q - k < window)


def own_seen(own_visible: jax.Array, q_pos: jax.Array, window: jax.Array | int | None) -> jax.Array:
    """The block's own visibility within the sliding window: bool [B, P, P]."""
    if window is None:
        return own_visible
    return own_visible & (q_pos[:, :, None] - q_pos[:, None, :] < window)


def grouped(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, P, N, H] -> [B, K, G, P, H]: query heads grouped by the KV head they read."""
    b, p, n, h = q.shape
    return q.reshape(b, p, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)


def default_block(rows: int) -> int:
    """Slots whose logits exist at once, for `rows` = batch * heads * rows of a block.

    On GPUs every loop iteration costs kernel launches, and with traced bounds a wait for the host.
    So a block there is as large as 256 MiB of float32 logits, and decoding has no loop. Elsewhere
    blocks are small.
    """
    if target_platform() not in ("gpu", "cuda"):
        return KEY_BLOCK
    return max(KEY_BLOCK, _LOGIT_BYTES // (4 * rows) // KEY_BLOCK * KEY_BLOCK)


def key_blocks(slots: int, key_block: int) -> tuple[int, int]:
    """Size and number of the blocks that cover `slots` slots."""
    size = min(slots, key_block)
    return size, -(-slots // size)


def read_block(j, size: int, slots: int, *arrays: jax.Array):
    """Block `j` of arrays whose second-to-last axis is slots, and which of its slots are new.

    If `size` does not divide `slots`, the last block is moved back inside the array. Slots that
    the previous block has covered already are reported as not new, so none counts twice.
    """
    start = jnp.minimum(j * size, slots - size)
    blocks = tuple(jax.lax.dynamic_slice_in_dim(a, start, size, axis=-2) for a in arrays)
    return blocks, start + jnp.arange(size) >= j * size


def slot_bounds(slots: Slots | None, batch: int, heads: int, total: int) -> jax.Array:
    """The range of slots worth reading, for each row and KV head: int32 [B, K, 2]."""
    first, last = slots if slots is not None else (0, total)
    ends = [jnp.broadcast_to(jnp.asarray(a, jnp.int32), (batch, heads)) for a in (first, last)]
    return jnp.stack(ends, axis=-1)


def sweep_range(slots: Slots | None, total: int, size: int):
    """First and last (exclusive) block of `size` slots that any row and head needs."""
    first, last = slots if slots is not None else (0, total)
    first = first.min() if isinstance(first, jax.Array) else first
    last = last.max() if isinstance(last, jax.Array) else last
    return first // size, -(-last // size)
