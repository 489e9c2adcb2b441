# pyright: reportPrivateImportUsage=false
"""Attention of a few rows over a cache on NVIDIA GPUs from Hopper on, written for Mosaic GPU.

Flash decoding: the cache is split over warpgroups, each of which keeps a running softmax of 64
stacked rows (G * P of them, padded) over its run of blocks; XLA merges the parts with the rows'
own keys. Blocks past a head's filled slots are skipped.

Never run on a GPU so far: proved in interpret mode, and by compiling for an H100. XLA stays the
default on GPUs until a measurement on a card says otherwise.

Letters: B batch, P rows of the block, N query heads, K KV heads, G = N / K, H head dim, S slots,
R = G * P stacked rows.
"""

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = 1.0 / math.log(2.0)
NEVER = jnp.iinfo(jnp.int32).max  # position of an empty slot, as the kernels compare it
KEYS = 64  # slots of a block
_ROWS = 64  # of a tensor-core product
_STAGES = 2  # blocks on their way
_WARPGROUPS = 264  # to split the cache for: two at a time on each of an H100's multiprocessors
_COLUMNS = 64  # of the weighted values that leave at once: two warpgroups' memory has to fit
_FLOOR = -1e30  # of the running maximum: a row that sees nothing keeps it
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

# Layouts are spelled out: inferring them gave up on these kernels in jax 0.12.
PARAMETERS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    total, head_dim = k.shape[-2:]
    if head_dim not in (64, 128):
        return f"head dim {head_dim} is neither 64 nor 128"
    if total % KEYS:
        return f"{total} keys are not a multiple of {KEYS}"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        return f"queries {q.dtype} and keys {k.dtype} are not both bfloat16 or float16"
    return None


def tiled(dtype: Any) -> tuple[Any, Any]:
    """The layout in shared memory that tensor cores read: rows of 128 bytes, swizzled."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def load(ref: Any, layout: Any) -> jax.Array:
    """A shared-memory vector in a register layout; jax before 0.11 wants an index."""
    read: Any = plgpu.load
    index = inspect.signature(read).parameters.get("idx")
    index = ((),) if index is not None and index.default is inspect.Parameter.empty else ()
    return read(ref, *index, layout=layout)


def fetch(pairs: Any, barrier: Any) -> None:
    """Copies global to shared memory at once, and waits; the barrier counts that many arrivals."""
    for source, target in pairs:
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def logits_of(raw: jax.Array, scale: float, softcap: float | None) -> jax.Array:
    """Logits in units of log(2), as the hardware's power of two wants them."""
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


def partial_attention(
    q: jax.Array,  # [B * K, R, H], R a multiple of 64
    low: jax.Array,  # [B, R] int32
    high: jax.Array,  # [B, R] int32
    k: jax.Array,  # [(L,) B, K, S, H]
    v: jax.Array | None,  # like k; None: maxima and masses alone
    k_pos: jax.Array,  # [B, K or 1, S] int32
    ends: jax.Array,  # [B * K] int32 one past the last slot worth reading
    layer: jax.Array | None,  # int32 scalar where keys are a stack of layers
    *,
    count: int,  # rows that are no padding
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Running softmax of every run of blocks: maxima and masses [B * K, runs, count] float32 (in
    units of log(2)), and weighted values [B * K, runs, count, H] float32."""
    batch, heads, slots, dim = k.shape[-4:]
    rows = q.shape[1]
    kept = -(-count // 8) * 8 if rows == _ROWS else _ROWS  # rows of a tile that are written
    layer = jnp.zeros((), jnp.int32) if layer is None else layer
    numbers = jnp.concatenate([ends, layer[None]])
    blocks = slots // KEYS
    wanted = -(-_WARPGROUPS // (batch * heads * rows // _ROWS))
    each = -(-blocks // min(wanted, blocks))  # blocks that one warpgroup reads
    runs = -(-blocks // each)
    shared = k_pos.shape[1] == 1
    k_pos = jnp.where(k_pos < 0, NEVER, k_pos).reshape(-1)
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
                load(k_pos_sm, COLUMN), load(low_sm, ROW), load(high_sm, ROW), logits.shape, 1
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

                # Interpret mode knows neither operands in registers nor accumulators that start
                # with values: probabilities go through shared memory, sums are added here.
                new = pl.run_scoped(weighted, plgpu.ACC((_ROWS, dim), jnp.float32))
                acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0]) + new
            return m_new, mass, acc

        def at(j):
            return jnp.minimum(first + j, blocks - 1)

        def at_pos(j):
            return ((row if shared else bh) * blocks + at(j),)

        carry = (
            plgpu.layout_cast(jnp.full((_ROWS,), _FLOOR, jnp.float32), ROW),
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
    found = plgpu.kernel(
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
    )(q, low, high, numbers, k_pos, *arrays)
    m, mass = (a[:, :, :count] for a in found[:2])
    return m, mass, found[2][:, :, :count] if with_values else None


def _clear_dead(v_sm, k_pos_sm):
    """Zeroes the values of empty slots: they may be NaN, and 0 * NaN is NaN."""
    v = load(v_sm, plgpu.Layout.WGMMA)
    alive = lax.broadcast_in_dim(load(k_pos_sm, ROW), v.shape, [0]) < NEVER
    v_sm[...] = jnp.where(alive, v, jnp.zeros((), v.dtype))
    plgpu.commit_smem()


def stacked_rows(q, q_pos, window):
    """Rows of a group stacked and padded to whole tiles: q [B * K, R, H], low and high [B, R]."""
    batch, heads, groups, nodes, dim = q.shape
    pad = -(groups * nodes) % _ROWS
    rows = jnp.pad(q.reshape(batch * heads, groups * nodes, dim), ((0, 0), (0, pad), (0, 0)))
    low, high = row_range(jnp.tile(q_pos, (1, groups)), window)
    low, high = (jnp.pad(a, ((0, 0), (0, pad)), constant_values=-1) for a in (low, high))
    return rows, low, high


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
    m = jnp.maximum(logits.max(-1), _FLOOR)
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
    k: jax.Array,  # [B, K, P, H] the rows' own keys
    v: jax.Array,  # [B, K, P, H]
    own: jax.Array,  # [B, P, P] int8, row i sees row j
    q_pos: jax.Array,  # [B, P] int32
    context: tuple[jax.Array, jax.Array, jax.Array],  # k, v [(L,) B, K, S, H], pos [B, K or 1, S]
    bounds: jax.Array,  # [B * K * 2] int32 first slot worth reading and one past the last
    window: jax.Array | int | None,
    layer: jax.Array | None,  # int32 scalar where the context is a stack of layers
    *,
    scale: float,
    softcap: float | None,
    key_block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, K, G, P, H] in the dtype of `q`, log-sum-exp [B, K, G, P] float32."""
    del key_block  # blocks are what a tensor-core product takes
    count = q.shape[2] * q.shape[3]
    rows, low, high = stacked_rows(q, q_pos, window)
    parts = partial_attention(
        rows, low, high, *context, bounds[1::2], layer, count=count, scale=scale, softcap=softcap
    )
    lse, out = merge(parts, own_part(q, k, v, own, scale=scale, softcap=softcap))
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:4])
