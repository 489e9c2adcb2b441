"""Where the state of a batch lies on several devices, the same before and after every program.

XLA chooses how a program's results are split. If it chose another way than its arguments had, the
next call would compile once more.
"""

import dataclasses
import math
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding

from lookahead_jax.model.params import Params
from lookahead_jax.model.sharding import RULES, sharding

State = TypeVar("State", bound=Any)
"""A flax struct with a `cache` and the `sums` of its entries."""


def placed(state: State, params: Params) -> State:
    """`state` on the devices of the parameters; nothing happens to what lies there already.

    The cache is split by rows and KV heads where the mesh divides them, everything else is whole on
    every device. Without a mesh, `state` itself.
    """
    place = params["embed"].sharding
    if not isinstance(place, NamedSharding) or not isinstance(place.mesh, Mesh):
        return state
    mesh = place.mesh
    _, rows, heads, *_ = state.cache.k.shape
    axes = None, _divided("batch", rows, mesh), _divided("kv_heads", heads, mesh)
    split, whole = sharding(axes, mesh), sharding((), mesh)

    def put(a: jax.Array) -> jax.Array:
        return jax.device_put(a, split if a.ndim >= len(axes) else whole)

    cache, sums = jax.tree.map(put, (state.cache, state.sums))
    rest = jax.device_put(dataclasses.replace(state, cache=None, sums=None), whole)
    return dataclasses.replace(rest, cache=cache, sums=sums)


def _divided(axis: str, size: int, mesh: Mesh) -> str | None:
    """The logical axis, unless the mesh does not divide its size."""
    ways = math.prod(mesh.shape.get(name, 1) for name in RULES[axis])
    return None if size % ways else axis
