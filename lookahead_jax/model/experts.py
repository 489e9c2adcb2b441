"""Mixture of experts: a router sends each row of a block to a few of many MLPs.

The pairs of a row and one of its experts are sorted by expert. On TPU one `ragged_dot` multiplies
all of them, each with its expert's matrix. Elsewhere XLA turns `ragged_dot` into a product with the
matrices of all experts, so there the sorted pairs are cut into tiles of one expert each, and a loop
runs the dense MLP on them. Shapes are static: they depend on the number of rows, not on the routes.

Letters: B batch, P rows of a block, R = B * P rows, X experts, Y experts per row, D model, F mlp.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.dispatch import per_shard, target_platform
from lookahead_jax.model.config import ExpertsConfig, ModelConfig
from lookahead_jax.model.layers import gated, mlp
from lookahead_jax.model.params import Params

_LEAST, _MOST = 8, 256  # rows of a tile: fewer would read weights often, more would be padding
_NAMES = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
_LETTERS = {"gate": "XDF", "up": "XDF", "down": "XFD"}
_LETTERS |= {"gate_bias": "XF", "up_bias": "XF", "down_bias": "XD"}


def experts_mlp(
    p: Params,
    xs: Sequence[jax.Array],
    loras: Sequence[Params | None],
    *,
    config: ModelConfig,
) -> list[jax.Array]:
    """`layers.mlp` of a layer with experts: each row's weighted sum of its experts' outputs.

    Every [B, P, D] of `xs` may have another P. A row's result depends on that row alone. Raises
    ValueError for a LoRA on gate, up or down.
    """
    if any(lora is not None and not lora.keys().isdisjoint(_NAMES) for lora in loras):
        raise ValueError("experts take no LoRA: leave out gate, up and down")
    x = xs[0] if len(xs) == 1 else jnp.concatenate(xs, axis=1)
    weights, chosen = _routes(p, x, config)
    names = [name for name in _NAMES if name in p]

    def local(x, weights, chosen, *arrays):
        shard = dict(zip(names, arrays, strict=True))
        return _mixture(shard, x, weights, chosen, config)

    out = per_shard(
        local,
        (x, weights, chosen, *(p[name] for name in names)),
        ("BPD", "BPY", "BPY", *(_LETTERS[name] for name in names)),
        ("BPD",),
    )
    ends = [sum(x.shape[1] for x in xs[: i + 1]) for i in range(len(xs) - 1)]
    return jnp.split(out, ends, axis=1)


def _experts(config: ModelConfig) -> ExpertsConfig:
    if config.experts is None:
        raise ValueError(f"{config.model_type} models have no experts")
    return config.experts


def _routes(p: Params, x: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Weights (float32) and numbers (int32) of each row's experts: [B, P, Y] each."""
    experts = _experts(config)
    logits = jnp.einsum("bpd,dx->bpx", x, p["router"], preferred_element_type=jnp.float32)
    if experts.bias:
        logits = logits + p["router_bias"].astype(jnp.float32)[None, None]
    best, chosen = jax.lax.top_k(logits, experts.per_token)
    if experts.normalise:
        return jax.nn.softmax(best, axis=-1), chosen
    return jnp.exp(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)), chosen


class _Pairs(NamedTuple):
    """Rows and their experts on one device, Y pairs per row."""

    expert: jax.Array  # [R * Y] int32; X for an expert that another device holds
    rank: jax.Array  # [R * Y] int32 the pair's number among those of its expert
    sizes: jax.Array  # [X] int32 pairs of each expert
    per_row: int

    def arranged(self, tile: int, slots: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The pairs in order of their experts, of which each begins at a multiple of `tile`.

        Returns the slot of each pair [R * Y] (`slots` for another device's), the row in each slot
        [slots] (any, if the slot is empty), and where experts end, in tiles [X].
        """
        ends = jnp.cumsum(jax.lax.div(self.sizes + (tile - 1), jnp.int32(tile)))
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]]) * tile
        mine = self.expert < len(self.sizes)
        slot = jnp.where(mine, _take(starts, self.expert) + self.rank, slots)
        pair = (
            jnp.zeros(slots, jnp.int32)
            .at[slot]
            .set(jnp.arange(len(slot), dtype=jnp.int32), mode="drop")
        )
        return slot, jax.lax.div(pair, jnp.int32(self.per_row)), ends


def _pairs(chosen: jax.Array, count: int) -> _Pairs:
    """`chosen` int32 [B, P, Y], in 0 .. count - 1 for the experts of this device."""
    expert = chosen.reshape(-1)
    expert = jnp.where((expert >= 0) & (expert < count), expert, count)
    match = (expert[:, None] == jnp.arange(count, dtype=jnp.int32)[None]).astype(jnp.int32)
    until = jnp.cumsum(match, axis=0)
    return _Pairs(expert, ((until - 1) * match).sum(1), until[-1], chosen.shape[-1])


def _mixture(
    p: Params, x: jax.Array, weights: jax.Array, chosen: jax.Array, config: ModelConfig
) -> jax.Array:
    """The sum over experts of this device's rows; over a mesh, each device adds its experts."""
    count, axes = p["gate"].shape[0], []
    if count < _experts(config).count:
        axes.append("expert")
        chosen = chosen - jax.lax.axis_index("expert") * count
    if p["gate"].shape[2] < config.mlp_dim:
        axes.append("tensor")
        if "down_bias" in p:  # it counts once, and every part of F would add it
            first = (jax.lax.axis_index("tensor") == 0).astype(p["down_bias"].dtype)
            p = p | {"down_bias": p["down_bias"] * first}
    pairs = _pairs(chosen, count)
    run = _by_ragged_dot if target_platform() == "tpu" else _by_tiles
    out = run(p, x.reshape(-1, x.shape[-1]), pairs, config).astype(jnp.float32)
    # Pairs of other devices' experts may hold anything: it must not meet a weight.
    out = jnp.where((pairs.expert < count)[:, None], out, 0.0) * weights.reshape(-1, 1)
    out = out.reshape(*chosen.shape, -1).sum(-2)
    return (jax.lax.psum(out, tuple(axes)) if axes else out).astype(x.dtype)


def _by_ragged_dot(p: Params, rows: jax.Array, pairs: _Pairs, config: ModelConfig) -> jax.Array:
    """[R, D] -> the output of every pair [R * Y, D]."""
    total = len(pairs.expert)
    slot, row, ends = pairs.arranged(1, total)
    expert = _at(ends, jnp.arange(total, dtype=jnp.int32))

    def product(name, x):
        y = jax.lax.ragged_dot(x, p[name], pairs.sizes)
        return y if f"{name}_bias" not in p else y + _take(p[f"{name}_bias"], expert)

    x = _take(rows, row)
    y = product("down", gated(product("gate", x), product("up", x), config=config))
    return _take(y, slot)


def _by_tiles(p: Params, rows: jax.Array, pairs: _Pairs, config: ModelConfig) -> jax.Array:
    """`_by_ragged_dot`, as the dense MLP on tiles of one expert's rows."""
    total, experts = len(pairs.expert), len(pairs.sizes)
    tile = max(_LEAST, 1 << (total // (4 * experts)).bit_length())
    tile = min(tile, _MOST, len(rows))  # an expert has no row twice
    # In the worst case, the last tile of every expert holds one row.
    tiles = min(total, (total + min(experts, total) * (tile - 1)) // tile)
    slot, row, ends = pairs.arranged(tile, tiles * tile)

    def run(_, inputs):
        expert, row = inputs
        own = {
            name: jax.lax.dynamic_index_in_dim(a, expert, keepdims=False) for name, a in p.items()
        }
        return None, mlp(own, [_take(rows, row)[None]], [None], config=config)[0][0]

    expert = _at(ends, jnp.arange(tiles, dtype=jnp.int32))
    _, y = jax.lax.scan(run, None, (expert, row.reshape(tiles, tile)))
    return _take(y.reshape(tiles * tile, -1), slot)


def _at(ends: jax.Array, index: jax.Array) -> jax.Array:
    """The first expert that ends after each index; the last one for indices after all of them."""
    return jnp.minimum((index[:, None] >= ends[None]).sum(1, dtype=jnp.int32), len(ends) - 1)


def _take(a: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of an array; an index past the end takes the last one."""
    return jnp.take(a, index, axis=0, mode="clip")
