# pyright: reportPrivateImportUsage=false
"""Importance scoring on NVIDIA GPUs from Hopper on, written for Mosaic GPU.

A warpgroup takes a run of key blocks for one KV head. Keys are the rows of the tensor-core product
and a head's observers its columns, so the sum over observers stays within a few threads. Keys
stream through shared memory once; the group's queries stay there.

These kernels have not run on a GPU yet. They are tested in interpret mode and by compiling for an
H100. XLA stays the default on GPUs until a measurement shows that they are faster.

Letters: B batch, M observing rows, N query heads, K KV heads, G = N / K, H head dim, T entries.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lookahead_jax.kernels import attention_gpu as attention
from lookahead_jax.kernels import gpu_blocks as blocks
from lookahead_jax.kernels.common import LOG2E, NEVER, Places
from lookahead_jax.kernels.gpu_blocks import COLUMN, KEYS, ROW
from lookahead_jax.kernels.reductions import Finish

_STAGES = 3  # blocks of keys of the pipeline that are in flight
_BLOCKS = 16  # blocks of keys that one warpgroup reads, one after the other
_QUERY_BYTES = 96 * 1024  # of a group, resident in shared memory


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
    """Why the kernels do not support these arguments, or None."""
    groups = q.shape[2] // k.shape[1]
    size = -(-q.shape[1] // 8) * 8 * groups * q.shape[3] * q.dtype.itemsize
    if size > _QUERY_BYTES:
        return f"{q.shape[1]} observers of {groups} heads do not fit into shared memory"
    return blocks.unsupported(q, k)


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
    del key_block  # a block has the size of a tensor-core product
    settings: Any = dict(scale=scale, softcap=softcap)
    count = q.shape[2] * q.shape[3]
    rows = attention.stacked_rows(q, places.q_pos, places.window)
    m, mass, _ = attention.partial_attention(rows, k, None, places, count=count, **settings)
    if own_k is None:
        mine = jnp.zeros_like(m[:, 0]), jnp.zeros_like(mass[:, 0]), None
    else:
        mine = attention.own_part(q, own_k, None, places.own_seen, **settings)
    return attention.merge((m, mass, None), mine)[0].reshape(q.shape[:4])


def finishes(finish: Finish) -> bool:
    """Whether `column_scores` can do this: pooling would need the neighbours of a block."""
    return finish.pool is None


def column_scores(
    q: jax.Array,  # [B, K, G, M, H]
    k: jax.Array,  # [B, K, T, H]
    lse: jax.Array,  # [B, K, G, M] float32; +inf excludes a row
    places: Places,  # all keys are read, whatever the bounds: every block has to be written
    *,
    scale: float,
    softcap: float | None,
    maximum: bool,
    finish: Finish | None,
    key_block: int | None = None,
) -> jax.Array:
    """exp(logits - lse) summed over the rows of a head (or their maximum): [B, K, G, T].

    With `finish` reduced over the group: [B, K, T]. The kernel stands inside, hence the length: it
    is compiled for the sizes and settings that it closes over.
    """
    del key_block  # a block has the size of a tensor-core product
    batch, heads, groups, rows, dim = q.shape
    total = k.shape[2]
    block_count = total // KEYS
    pad = -rows % 8
    width = rows + pad
    q = jnp.pad(q, [(0, 0)] * 3 + [(0, pad), (0, 0)]).reshape(-1, groups, width, dim)
    low, high = blocks.row_range(places.q_pos, places.window)
    low, high = (jnp.pad(a, ((0, 0), (0, pad)), constant_values=-1) for a in (low, high))
    lse *= LOG2E
    if finish is not None and finish.group == "mean":
        lse += math.log2(groups)  # the divisor of the mean
    written = groups if finish is None else 1
    lse = jnp.pad(lse, [(0, 0)] * 3 + [(0, pad)]).reshape(-1, groups, width)
    shared = places.k_pos.shape[1] == 1
    k_pos = jnp.where(places.k_pos < 0, NEVER, places.k_pos).reshape(-1)

    def kernel(*refs):
        q_gm, low_gm, high_gm, lse_gm, k_pos_gm, k_gm, out_gm = refs[:7]
        q_sm, low_sm, high_sm, lse_sm, out_sm, barrier = refs[7:]
        bh, run = lax.axis_index("bh"), lax.axis_index("run")
        row = lax.div(bh, jnp.int32(heads))
        blocks.fetch(
            [
                *((q_gm.at[bh, g], q_sm.at[g]) for g in range(groups)),
                (low_gm.at[row], low_sm),
                (high_gm.at[row], high_sm),
                (lse_gm.at[bh], lse_sm),
            ],
            barrier,
        )
        first = run * _BLOCKS

        def step(at, k_pos_sm, k_sm):
            seen = blocks.visible(
                blocks.read_shared(k_pos_sm, ROW), blocks.read_shared(low_sm, COLUMN),
                blocks.read_shared(high_sm, COLUMN), (KEYS, width), 0,
            )  # fmt: skip
            columns = []
            for g in range(groups):

                def product(ref, g=g):
                    plgpu.wgmma(ref, k_sm, q_sm.at[g].transpose((1, 0)))
                    return ref[...]

                raw = pl.run_scoped(product, plgpu.ACC((KEYS, width), jnp.float32))
                logits = blocks.logits_of(raw, scale, softcap)
                norm = lax.broadcast_in_dim(
                    blocks.read_shared(lse_sm.at[g], COLUMN), logits.shape, [1]
                )
                p = jnp.where(seen, jnp.exp2(logits - norm), 0.0)
                columns.append(p.max(axis=1) if maximum else p.sum(axis=1))
            if finish is not None:
                join = jnp.maximum if finish.group == "max" else jnp.add
                columns = [functools.reduce(join, columns)]
            # The previous block was copied out while this one was computed.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i, column in enumerate(columns):
                out_sm[i] = column
            plgpu.commit_smem()
            here = pl.ds((first + at[0]) * KEYS, KEYS)
            plgpu.copy_smem_to_gmem(out_sm, out_gm.at[bh, :, here])

        plgpu.emit_pipeline(
            step,
            grid=(jnp.minimum(block_count - first, _BLOCKS),),
            in_specs=[
                plgpu.BlockSpec(
                    (KEYS,), lambda j: ((row if shared else bh) * block_count + first + j,)
                ),
                plgpu.BlockSpec(
                    (KEYS, dim),
                    lambda j: (bh * block_count + first + j, 0),
                    transforms=blocks.tiled(k.dtype),
                ),
            ],
            max_concurrent_steps=_STAGES,
        )(k_pos_gm, k_gm)
        plgpu.wait_smem_to_gmem(0)

    scores = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch * heads, written, total), jnp.float32),
        grid=(-(-block_count // _BLOCKS), batch * heads),
        grid_names=("run", "bh"),
        compiler_params=blocks.PARAMETERS,
        scratch_types=[
            plgpu.SMEM((groups, width, dim), q.dtype, transforms=blocks.tiled(q.dtype)),
            plgpu.SMEM((width,), jnp.int32),
            plgpu.SMEM((width,), jnp.int32),
            plgpu.SMEM((groups, width), jnp.float32),
            plgpu.SMEM((written, KEYS), jnp.float32),
            plgpu.Barrier(num_arrivals=groups + 3),
        ],
    )(q, low, high, lse, k_pos, k.reshape(-1, dim))
    lead = (batch, heads, groups) if finish is None else (batch, heads)
    return scores.reshape(*lead, total)
