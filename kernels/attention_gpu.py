# pyright: reportPrivateImportUsage=false
"""Attention of a few rows over a cache on NVIDIA GPUs from Hopper on, written for Mosaic GPU.

Flash decoding: the cache is split over warpgroups. Each keeps a running softmax of 64 stacked rows
(G * P of them, padded) over its run of blocks, and XLA merges the parts with the rows' own keys.
Blocks past a head's filled slots are skipped.

These kernels have not run on a GPU yet. They are tested in interpret mode and by compiling for an
H100. XLA stays the default on GPUs until a measurement shows that they are faster.

Letters: B batch, P rows of the block, N query heads, K KV heads, G = N / K, H head dim, S slots,
R = G * P stacked rows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lookahead_jax.kernels.common import FLOOR, LOG2E, NEVER, Places
from lookahead_jax.kernels.gpu_blocks import (
    COLUMN,
    KEYS,
    PARAMETERS,
    ROW,
    fetch,
    logits_of,
    read_shared,
    row_range,
    tiled,
    visible,
)

_ROWS = 64  # of a tensor-core product
_STAGES = 2  # blocks of the pipeline that are in flight
_WARPGROUPS = 264  # to split the cache for: two on each of an H100's multiprocessors
_COLUMNS = 64  # of the weighted values written at once: limits shared memory to two warpgroups'


class Rows(NamedTuple):
    """The stacked rows of each KV head, R of them, a multiple of 64."""

    q: jax.Array  # [B * K, R, H]
    low: jax.Array  # [B, R] int32 positions that a row sees, exclusive
    high: jax.Array  # [B, R] int32 inclusive


def partial_attention(
    stacked: Rows,
    k: jax.Array,  # [(L,) B, K, S, H]
    v: jax.Array | None,  # like k; None: only maxima and masses
    places: Places,
    *,
    count: int,  # rows that are not padding
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Running softmax of every run of blocks, in float32.

    Returns maxima (in units of log(2)) and masses [B * K, runs, count], and weighted values
    [B * K, runs, count, H]. The kernel stands inside, hence the length: it is compiled for the
    sizes and settings that it closes over.
    """
    q = stacked.q
    batch, heads, slots, dim = k.shape[-4:]
    rows = q.shape[1]
    kept = -(-count // 8) * 8 if rows == _ROWS else _ROWS  # rows of a tile that are written
    layer = jnp.zeros((), jnp.int32) if places.layer is None else places.layer
    numbers = jnp.concatenate([places.bounds[1::2], layer[None]])  # ends, then the layer
    blocks = slots // KEYS
    wanted = -(-_WARPGROUPS // (batch * heads * rows // _ROWS))
    each = -(-blocks // min(wanted, blocks))  # blocks that one warpgroup reads
    runs = -(-blocks // each)
    shared = places.k_pos.shape[1] == 1
    k_pos = jnp.where(places.k_pos < 0, NEVER, places.k_pos).reshape(-1)
    with_values = v is not None
    arrays = [k.reshape(-1, dim)] + ([v.reshape(-1, dim)] if with_values else [])

    def kernel(q_gm, low_gm, high_gm, numbers_gm, k_pos_gm, *rest):
        keys_gm, rest = rest[: len(arrays)], rest[len(arrays) :]
        outs, (q_sm, low_sm, high_sm, p_sm, stat_sm, acc_sm, barrier) = rest[:-7], rest[-7:]
        run, tile, bh = (lax.axis_index(name) for name in ("run", "tile", "bh"))
        here = pl.ds(tile * _ROWS, _ROWS)
        row = lax.div(bh, jnp.int32(heads))
        fetch(
            [
                (q_gm.at[bh, here], q_sm),
                (low_gm.at[row, here], low_sm),
                (high_gm.at[row, here], high_sm),
            ],
            barrier,
        )
        first = run * each
        filled = lax.div(numbers_gm[bh] + KEYS - 1, jnp.int32(KEYS))
        stored = numbers_gm[batch * heads] * (batch * heads) + bh
        count = jnp.clip(filled - first, 0, each)

        def step(_, k_pos_sm, k_sm, *more):
            *v_sm, (m, mass, acc) = more

            def product(ref):
                plgpu.wgmma(ref, q_sm, k_sm.transpose((1, 0)))
                return ref[...]

            raw = pl.run_scoped(product, plgpu.ACC((_ROWS, KEYS), jnp.float32))
            logits = logits_of(raw, scale, softcap)
            seen = visible(
                read_shared(k_pos_sm, COLUMN),
                read_shared(low_sm, ROW),
                read_shared(high_sm, ROW),
                logits.shape,
                1,
            )
            logits = jnp.where(seen, logits, -jnp.inf)
            m_new = jnp.maximum(m, logits.max(axis=1))
            p = jnp.exp2(logits - lax.broadcast_in_dim(m_new, logits.shape, [0]))
            shrink = jnp.exp2(m - m_new)
            mass = mass * shrink + p.sum(axis=1)
            if with_values:
                _clear_dead(v_sm[0], k_pos_sm)
                p_sm[...] = p.astype(q.dtype)
                plgpu.commit_smem()

                def weighted(ref):
                    plgpu.wgmma(ref, p_sm, v_sm[0])
                    return ref[...]

                # Interpret mode supports neither operands in registers nor accumulators with an
                # initial value: probabilities go through shared memory, sums are added here.
                new = pl.run_scoped(weighted, plgpu.ACC((_ROWS, dim), jnp.float32))
                acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0]) + new
            return m_new, mass, acc

        def at(j):
            return jnp.minimum(first + j, blocks - 1)

        def at_pos(j):
            return ((row if shared else bh) * blocks + at(j),)

        carry = (
            plgpu.layout_cast(jnp.full((_ROWS,), FLOOR, jnp.float32), ROW),
            plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), ROW),
            plgpu.layout_cast(jnp.zeros((_ROWS, dim), jnp.float32), plgpu.Layout.WGMMA)
            if with_values
            else jnp.zeros((), jnp.float32),
        )
        m, mass, acc = plgpu.emit_pipeline(
            step,
            grid=(count,),
            in_specs=[
                plgpu.BlockSpec((KEYS,), at_pos),
                *[
                    plgpu.BlockSpec(
                        (KEYS, dim),
                        lambda j: (stored * blocks + at(j), 0),
                        transforms=tiled(k.dtype),
                    )
                ]
                * len(arrays),
            ],
            max_concurrent_steps=_STAGES,
            init_carry=carry,
        )(k_pos_gm, *keys_gm)
        first_rows, there = pl.ds(0, kept), pl.ds(tile * _ROWS, kept)
        for value, out in ((m, outs[0]), (mass, outs[1])):
            stat_sm[...] = value
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stat_sm.at[first_rows], out.at[bh, run, there])
            plgpu.wait_smem_to_gmem(0)
        if with_values:
            for column in range(0, dim, _COLUMNS):
                acc_sm[...] = acc[:, column : column + _COLUMNS]
                plgpu.commit_smem()
                target = outs[2].at[bh, run, there, pl.ds(column, _COLUMNS)]
                plgpu.copy_smem_to_gmem(acc_sm.at[first_rows], target)
                plgpu.wait_smem_to_gmem(0)

    written = rows // _ROWS * kept
    stat = jax.ShapeDtypeStruct((batch * heads, runs, written), jnp.float32)
    out_type = [stat, stat]
    if with_values:
        out_type.append(jax.ShapeDtypeStruct((batch * heads, runs, written, dim), jnp.float32))
    outputs = plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(runs, rows // _ROWS, batch * heads),
        grid_names=("run", "tile", "bh"),
        compiler_params=PARAMETERS,
        scratch_types=[
            plgpu.SMEM((_ROWS, dim), q.dtype, transforms=tiled(q.dtype)),
            plgpu.SMEM((_ROWS,), jnp.int32),
            plgpu.SMEM((_ROWS,), jnp.int32),
            plgpu.SMEM((_ROWS, KEYS), q.dtype, transforms=tiled(q.dtype)),
            plgpu.SMEM((_ROWS,), jnp.float32),
            plgpu.SMEM((_ROWS, _COLUMNS), jnp.float32, transforms=tiled(jnp.float32)),
            plgpu.Barrier(num_arrivals=3),
        ],
    )(*stacked, numbers, k_pos, *arrays)
    m, mass = (a[:, :, :count] for a in outputs[:2])
    return m, mass, outputs[2][:, :, :count] if with_values else None


def _clear_dead(v_sm, k_pos_sm):
    """Zeroes the values of empty slots: they may be NaN, and 0 * NaN is NaN."""
    v = read_shared(v_sm, plgpu.Layout.WGMMA)
    alive = lax.broadcast_in_dim(read_shared(k_pos_sm, ROW), v.shape, [0]) < NEVER
    v_sm[...] = jnp.where(alive, v, jnp.zeros((), v.dtype))
    plgpu.commit_smem()


def stacked_rows(q, q_pos, window) -> Rows:
    """The rows of a group, q [B, K, G, P, H], stacked and padded to whole tiles."""
    batch, heads, groups, nodes, dim = q.shape
    pad = -(groups * nodes) % _ROWS
    rows = jnp.pad(q.reshape(batch * heads, groups * nodes, dim), ((0, 0), (0, pad), (0, 0)))
    low, high = row_range(jnp.tile(q_pos, (1, groups)), window)
    low, high = (jnp.pad(a, ((0, 0), (0, pad)), constant_values=-1) for a in (low, high))
    return Rows(rows, low, high)


def merge(parts: Any, own: Any) -> tuple[jax.Array, Any]:
    """Joins partial softmaxes (maxima, masses, values or None) along axis 1 with `own`'s."""
    parts = [
        jnp.concatenate([a, b[:, None]], axis=1) if a is not None else None
        for a, b in zip(parts, own, strict=True)
    ]
    m, mass, values = parts
    top = m.max(1)
    weight = jnp.exp2(m - top[:, None])
    total = (mass * weight).sum(1)
    safe = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top / LOG2E + jnp.log(safe), -jnp.inf)
    if values is None:
        return lse, None
    return lse, (values * weight[..., None]).sum(1) / safe[..., None]


def own_part(q, k, v, own, *, scale, softcap):
    """The rows' own keys as one more part, by XLA: maxima, masses [B * K, R], values."""
    batch, heads, groups, nodes, dim = q.shape
    raw = jnp.einsum("bkgph,bkjh->bkgpj", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(own[:, None, None] > 0, logits_of(raw, scale, softcap), -jnp.inf)
    m = jnp.maximum(logits.max(-1), FLOOR)
    p = jnp.exp2(logits - m[..., None])
    flat = (batch * heads, groups * nodes)
    values = None
    if v is not None:
        values = jnp.einsum(
            "bkgpj,bkjh->bkgph", p.astype(v.dtype), v, preferred_element_type=jnp.float32
        ).reshape(*flat, dim)
    return m.reshape(flat), p.sum(-1).reshape(flat), values


def attend(
    q: jax.Array,  # [B, K, G, P, H]
    own: tuple[jax.Array, jax.Array],  # the rows' own keys and values [B, K, P, H]
    context: tuple[jax.Array, jax.Array],  # keys and values [(L,) B, K, S, H]
    places: Places,
    *,
    scale: float,
    softcap: float | None,
    key_block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, K, G, P, H] in the dtype of `q`, log-sum-exp [B, K, G, P] float32."""
    del key_block  # a block has the size of a tensor-core product
    count = q.shape[2] * q.shape[3]
    rows = stacked_rows(q, places.q_pos, places.window)
    parts = partial_attention(rows, *context, places, count=count, scale=scale, softcap=softcap)
    mine = own_part(q, *own, places.own_seen, scale=scale, softcap=softcap)
    lse, out = merge(parts, mine)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:4])
