"""Importance scoring on TPU: two Pallas kernels, each one sweep over the keys.

`row_lse` computes the log-sum-exp of every observing row, `column_scores` the sum (or maximum) of
each key's probabilities over the rows of a head. A grid step holds one block of keys and one tile
of observers. The G query heads of a KV head share the keys, and their rows are stacked, so the
matrix unit gets G * tile rows. Nothing of size [M, T] leaves the chip's vector memory.

Letters: B batch, M observing rows, N query heads, K KV heads, G = N / K, H head dim, T entries.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lookahead_jax.kernels.common import FLOOR, LANES, LOG2E, Places
from lookahead_jax.kernels.reductions import Finish
from lookahead_jax.kernels.tpu_blocks import (
    as_stored,
    block_size,
    live,
    masked_logits,
    pad_axis,
    read_at,
    slots_spec,
)

_STATISTICS_BLOCK = 512  # keys whose logits exist at once while row sums are computed
_ROWS = 256  # rows of a tile, all heads of a group together


def observer_tile(rows: int, groups: int) -> int:
    """Rows per head of a tile: a multiple of 16 (a bfloat16 tile), at most _ROWS for the group."""
    most = max(_ROWS // groups // 16, 1) * 16
    return min(most, -(-rows // 16) * 16)


def _lse_kernel(*refs, scale, softcap, windowed, with_own, size):
    bounds_ref, window_ref, q_ref, q_pos_ref, k_ref, k_pos_ref, own_ref, own_seen_ref = refs[:8]
    out_ref, m_ref, mass_ref = refs[8:]
    block = pl.program_id(3)
    groups, tile, dim = q_ref.shape
    settings = dict(scale=scale, softcap=softcap)
    window = window_ref[0] if windowed else None

    def accumulate(logits, seen):
        # Maxima and masses are per lane: lanes are reduced once, at the end.
        logits = jnp.where(seen, logits, -jnp.inf)
        parts = [logits[:, i : i + LANES] for i in range(0, logits.shape[1], LANES)]
        m = m_ref[...]
        m_new = functools.reduce(jnp.maximum, parts, m)
        new = sum(jnp.exp2(part - m_new) for part in parts)
        mass_ref[...] = mass_ref[...] * jnp.exp2(m - m_new) + new
        m_ref[...] = m_new

    def rows():
        q = q_ref[...].reshape(groups * tile, dim)
        return q, jnp.concatenate([q_pos_ref[...]] * groups, axis=0)

    @pl.when(block == 0)
    def _():
        m_ref[...] = jnp.full_like(m_ref, FLOOR)
        mass_ref[...] = jnp.zeros_like(mass_ref)
        if with_own:
            q, q_pos = rows()
            width = own_ref.shape[0]
            everywhere = jnp.zeros((1, width), jnp.int32)
            logits, _ = masked_logits(
                q, own_ref[...], everywhere, jnp.maximum(q_pos, 0), None, **settings
            )
            seen = own_seen_ref[...].astype(jnp.int32)
            accumulate(logits, jnp.concatenate([seen] * groups, axis=0) > 0)

    @pl.when(live(bounds_ref, block, size))
    def _():
        q, q_pos = rows()
        step = min(_STATISTICS_BLOCK, size)
        for i in range(0, size, step):
            part = slice(i, min(i + step, size))
            k = k_ref[part] if k_ref.shape[1] == dim else k_ref[:, part]
            accumulate(*masked_logits(q, k, k_pos_ref[:, part], q_pos, window, **settings))

    @pl.when(block == pl.num_programs(3) - 1)
    def _():
        m = m_ref[...].max(-1, keepdims=True)
        mass = (mass_ref[...] * jnp.exp2(m_ref[...] - m)).sum(-1, keepdims=True)
        seen = mass > 0
        lse = jnp.where(seen, m / LOG2E + jnp.log(jnp.where(seen, mass, 1.0)), -jnp.inf)
        out_ref[...] = lse.reshape(groups, tile, 1)


def _windows(x, kernel: int, join):
    """`join` over the `kernel` lanes that end at each lane, by doubling; lanes wrap around.

    `kernel` is odd, so the lane itself is the window to start from.
    """
    window, have, power, width = x, 1, x, 1
    while have < kernel:
        power = join(power, pltpu.roll(power, width, 1))
        width *= 2
        if kernel & width:
            window = join(window, pltpu.roll(power, have, 1))
            have += width
    return window


def _columns_kernel(*refs, scale, softcap, windowed, maximum, finish, size):
    bounds_ref, window_ref, q_ref, q_pos_ref, lse_ref, k_ref, k_pos_ref, valid_ref = refs[:8]
    out_ref, *scratch = refs[8:]
    block, part = pl.program_id(2), pl.program_id(3)
    groups, tile, dim = q_ref.shape
    sums_ref = scratch[0] if scratch else out_ref
    heads = sums_ref.shape[0]

    @pl.when(part == 0)
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(live(bounds_ref, block, size))
    def _():
        q = q_ref[...].reshape(groups * tile, dim)
        q_pos = jnp.concatenate([q_pos_ref[...]] * groups, axis=0)
        logits, seen = masked_logits(
            q, k_ref[...], k_pos_ref[...], q_pos, window_ref[0] if windowed else None,
            scale=scale, softcap=softcap,
        )  # fmt: skip
        p = jnp.where(seen, jnp.exp2(logits - lse_ref[...].reshape(groups * tile, 1)), 0.0)
        p = p.reshape(heads, groups * tile // heads, p.shape[-1])
        if maximum:
            sums_ref[...] = jnp.maximum(sums_ref[...], p.max(1))
        else:
            sums_ref[...] += p.sum(1)

    if not scratch:
        return

    def grouped(x):
        return x.max(0, keepdims=True) if finish.group == "max" else x.sum(0, keepdims=True)

    @pl.when(part == pl.num_programs(3) - 1)
    def _():
        if finish.pool is None:
            out_ref[...] = grouped(sums_ref[...])
            return
        # Pooling needs the right neighbour, so a block is pooled one step later.
        line_ref = scratch[1]
        kind, kernel = finish.pool
        join, padding = (jnp.maximum, -jnp.inf) if kind == "max" else (jnp.add, 0.0)
        inside = (valid_ref[...].astype(jnp.int32) > 0) & (block < pl.num_programs(2) - 1)
        new = jnp.where(inside, sums_ref[...], padding)

        @pl.when(block == 0)
        def _():
            line_ref[...] = jnp.full_like(line_ref, padding)

        @pl.when(block > 0)
        def _():
            line = jnp.concatenate([line_ref[...], new[:, :LANES]], axis=1)
            pooled = _windows(line, kernel, join)
            pooled = pltpu.roll(pooled, pooled.shape[1] - (LANES + kernel // 2), 1)
            out_ref[...] = grouped(pooled[:, :size])

        line_ref[:, :LANES] = line_ref[:, size:]
        line_ref[:, LANES:] = new


def finishes(finish: Finish) -> bool:
    """Whether `column_scores` can do this: a block sees 128 lanes of its right neighbour."""
    return finish.pool is None or finish.pool[1] < 2 * LANES


def _layout(q, k, places: Places, key_block):
    """Padded arguments of both kernels and the sizes of their grids."""
    groups = q.shape[2]
    tile = observer_tile(q.shape[3], groups)
    q = pad_axis(q, 3, tile)
    q_pos = pad_axis(places.q_pos, 1, tile, -1)[..., None]
    size = block_size(k, key_block)
    k_pos = pad_axis(places.k_pos, 2, size, -1)[:, :, None]
    window = places.window
    windows = jnp.zeros(1, jnp.int32) if window is None else jnp.asarray(window).reshape(1)
    return q, q_pos, k_pos, windows, tile, size


def _cost(q, k, *, exponentials: int, written: int) -> pl.CostEstimate:
    """For XLA's scheduler: one product of all rows with all keys."""
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * q.shape[3] * k.shape[2]
    read = q.size * q.dtype.itemsize + k.size * k.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * pairs * q.shape[4],
        transcendentals=exponentials * pairs,
        bytes_accessed=read + written,
    )


def row_lse(
    q: jax.Array,  # [B, K, G, M, H]
    k: jax.Array,  # [B, K, T, H]
    own_k: jax.Array | None,  # [B, K, M, H] the rows' own keys
    places: Places,
    *,
    scale: float,
    softcap: float | None,
    key_block: int | None = None,
) -> jax.Array:
    """Log-sum-exp of each row's logits, float32 [B, K, G, M]; -inf where a row sees nothing."""
    batch, heads, groups, rows, dim = q.shape
    q, q_pos, k_pos, windows, tile, size = _layout(q, k, places, key_block)
    kernel = functools.partial(
        _lse_kernel, scale=scale, softcap=softcap, windowed=places.window is not None,
        with_own=own_k is not None, size=size,
    )  # fmt: skip
    seen = places.own_seen
    if own_k is None or seen is None:
        own_k = jnp.zeros((batch, heads, 1, dim), q.dtype)
        seen = jnp.zeros((batch, 1, 1), jnp.int8)
    own_k = pad_axis(own_k, 2, LANES)
    seen = pad_axis(pad_axis(seen, 1, q.shape[3]), 2, LANES)
    per_head = k_pos.shape[1] > 1
    tiles, blocks = q.shape[3] // tile, k_pos.shape[3] // size

    def at_rows(b, h, i, j, *_):
        return b, h, 0, i, 0

    def at_keys(b, h, i, j, *refs):
        return b, h, read_at(refs[0], b * heads + h, j, size=size)

    def at_pos(b, h, i, j, *refs):
        return b, h if per_head else 0, 0, read_at(refs[0], b * heads + h, j, size=size)

    lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, tiles, blocks),
            in_specs=[
                pl.BlockSpec((None, None, groups, tile, dim), at_rows),
                pl.BlockSpec((None, tile, 1), lambda b, h, i, j, *_: (b, i, 0)),
                slots_spec(dim, size, 2, at_keys),
                pl.BlockSpec((None, None, 1, size), at_pos),
                pl.BlockSpec((None, None, *own_k.shape[2:]), lambda b, h, *_: (b, h, 0, 0)),
                pl.BlockSpec((None, tile, seen.shape[2]), lambda b, h, i, *_: (b, i, 0)),
            ],
            out_specs=pl.BlockSpec((None, None, groups, tile, 1), at_rows),
            scratch_shapes=[pltpu.VMEM((groups * tile, LANES), jnp.float32)] * 2,
        ),
        out_shape=jax.ShapeDtypeStruct((*q.shape[:4], 1), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(q, k, exponentials=1, written=0),
        name="importance_row_lse",
    )(places.bounds, windows, q, q_pos, as_stored(k), k_pos, own_k, seen)
    return lse[..., :rows, 0]


def _reduction(
    finish: Finish | None, groups: int, *, size: int, maximum: bool
) -> tuple[float, list[Any]]:
    """What `finish` adds to the log-sum-exp (the divisors of means), and the scratch it needs."""
    if finish is None:
        return 0.0, []
    pool = finish.pool
    reductions = {maximum, finish.group == "max"} | ({pool[0] == "max"} if pool else set())
    # If all reductions are the same, the group counts as one head with more rows.
    apart = groups if len(reductions) > 1 else 1
    shift = math.log2(groups) if finish.group == "mean" else 0.0
    scratch = []
    if apart > 1 or pool is not None:
        scratch.append(pltpu.VMEM((apart, size), jnp.float32))
    if pool is not None:
        shift += math.log2(pool[1]) if pool[0] == "avg" else 0.0
        scratch.append(pltpu.VMEM((apart, LANES + size), jnp.float32))
    return shift, scratch


def column_scores(
    q: jax.Array,  # [B, K, G, M, H]
    k: jax.Array,  # [B, K, T, H]
    lse: jax.Array,  # [B, K, G, M] float32; +inf excludes a row
    places: Places,
    *,
    scale: float,
    softcap: float | None,
    maximum: bool,
    finish: Finish | None,
    key_block: int | None = None,
) -> jax.Array:
    """exp(logits - lse) summed over the rows of a head (or their maximum): [B, K, G, T].

    With `finish` pooled, and reduced over the group: [B, K, T]. Most of its lines are the blocks
    and index maps of one `pallas_call`, which belong together.
    """
    batch, heads, groups, _, dim = q.shape
    q, q_pos, k_pos, windows, tile, size = _layout(q, k, places, key_block)
    per_head = k_pos.shape[1] > 1
    tiles, blocks = q.shape[3] // tile, k_pos.shape[3] // size
    pool = None if finish is None else finish.pool
    written, steps = 1 if finish else groups, blocks + (pool is not None)
    shift, scratch = _reduction(finish, groups, size=size, maximum=maximum)
    lse = lse * LOG2E + shift
    lse = pad_axis(lse, 3, tile)[..., None]
    valid = jnp.ones((1, 1, size), bool) if places.valid is None else places.valid
    valid = pad_axis(valid.astype(jnp.int8), 2, size)[:, :, None]
    body = functools.partial(
        _columns_kernel, scale=scale, softcap=softcap, windowed=places.window is not None,
        maximum=maximum, finish=finish, size=size,
    )  # fmt: skip

    def at_rows(b, h, j, i, *_):
        return b, h, 0, i, 0

    def at_keys(b, h, j, i, *refs):
        return b, h, read_at(refs[0], b * heads + h, j, size=size)

    def at_pos(b, h, j, i, *refs):
        return b, h if per_head else 0, 0, read_at(refs[0], b * heads + h, j, size=size)

    def at_valid(b, h, j, *_):
        if pool is None:
            return 0, 0, 0, 0
        return b, h if valid.shape[1] > 1 else 0, 0, jnp.minimum(j, blocks - 1)

    def at_out(b, h, j, *_):
        return b, h, 0, j if pool is None else jnp.maximum(j - 1, 0)

    scores = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, steps, tiles),
            in_specs=[
                pl.BlockSpec((None, None, groups, tile, dim), at_rows),
                pl.BlockSpec((None, tile, 1), lambda b, h, j, i, *_: (b, i, 0)),
                pl.BlockSpec((None, None, groups, tile, 1), at_rows),
                slots_spec(dim, size, 2, at_keys),
                pl.BlockSpec((None, None, 1, size), at_pos),
                pl.BlockSpec((None, None, 1, size), at_valid),
            ],
            out_specs=pl.BlockSpec((None, None, written, size), at_out),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((batch, heads, written, k.shape[2]), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                "parallel", "parallel", "parallel" if pool is None else "arbitrary", "arbitrary"
            )
        ),
        cost_estimate=_cost(q, k, exponentials=1, written=4 * batch * heads * written * k.shape[2]),
        name="importance_column_scores",
    )(places.bounds, windows, q, q_pos, lse, as_stored(k), k_pos, valid)  # fmt: skip
    return scores if finish is None else scores[:, :, 0]
