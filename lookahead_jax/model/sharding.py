"""Placement of arrays: a mesh with data, fsdp, expert and tensor axes, and one table of rules.

Other code names the logical axes of its arrays ("embed", "heads", "batch", ...). Only this table
says which mesh axes split them.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.parameter_specs import (
    ParameterSpec,
    WeightType,
    axis_sizes,
    parameter_specs,
)
from lookahead_jax.model.params import Params, tree
from lookahead_jax.model.quantization import QuantizedWeight

F = TypeVar("F", bound=Callable[..., Any])
MESH_AXES = ("data", "fsdp", "expert", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "layer": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "expert": ("expert",),
}


def make_mesh(
    *,
    data: int | None = None,
    fsdp: int = 1,
    expert: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with axes data, fsdp, expert and tensor over `devices` (default: all devices present).

    `expert` splits the experts of a mixture and nothing else. With `data` None, the data axis takes
    the devices that the others leave.

    Raises:
      ValueError: when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data is None:
        data = len(devices) // max(fsdp * expert * tensor, 1)
    sizes = (data, fsdp, expert, tensor)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        named = ", ".join(f"{axis}={n}" for axis, n in zip(MESH_AXES, sizes, strict=True))
        raise ValueError(
            f"a mesh of {named} does not use exactly the {len(devices)} devices present"
        )
    # Auto: the default, Explicit, rejects a plain lookup in a sharded embedding table.
    auto = (AxisType.Auto,) * len(MESH_AXES)
    # As jax.make_mesh, but splitting physical axes: 8 chips of a 4x4x4 slice can form an axis.
    arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(arranged, MESH_AXES, axis_types=auto)


def partition_spec(axes: Sequence[str | None], mesh: Mesh) -> PartitionSpec:
    """Applies the rules to the logical axes of an array; an axis None is never split.

    Rules for mesh axes that `mesh` lacks have no effect, so a mesh of ("data", "tensor") works.

    Raises:
      ValueError: for a logical axis that the table does not contain.
    """
    entries = []
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(f"unknown logical axis {axis!r}; known: {', '.join(RULES)}")
        split = tuple(name for name in RULES[axis] if name in mesh.axis_names) if axis else ()
        entries.append(split if len(split) > 1 else split[0] if split else None)
    return PartitionSpec(*entries)


def sharding(axes: Sequence[str | None], mesh: Mesh) -> NamedSharding:
    """`partition_spec` as a sharding on the mesh."""
    return NamedSharding(mesh, partition_spec(axes, mesh))


def param_shardings(config: ModelConfig, mesh: Mesh, weights: WeightType | None = None) -> Params:
    """The parameter tree with a `NamedSharding` for each array.

    Raises:
      ValueError: if a size of the model is not divisible by the mesh axes that split it.
    """
    used = {axis for spec in parameter_specs(config).values() for axis in spec.axes}
    for axis, size in axis_sizes(config).items():
        ways = math.prod(mesh.shape.get(name, 1) for name in RULES[axis]) if axis in used else 1
        if size % ways:
            raise ValueError(
                f"{axis} has size {size}, not a multiple of {ways} (mesh axes "
                f"{' x '.join(RULES[axis])}); choose a smaller {RULES[axis][-1]} axis"
            )

    def place(spec: ParameterSpec) -> Any:
        if not spec.quantized(weights):
            return sharding(spec.axes, mesh)
        axes = (spec.axes, spec.output_axes, (*spec.sample_axes, None))
        places: Any = [sharding(names, mesh) for names in axes]
        return QuantizedWeight(*places)

    return tree({path: place(spec) for path, spec in parameter_specs(config).items()})


def mesh_of(params: Params) -> Mesh | None:
    """The mesh of sharded parameters; None for parameters on one device."""
    placed = params["embed"].sharding
    mesh = placed.mesh if isinstance(placed, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def mesh_in_use(params: Params) -> contextlib.AbstractContextManager[Any]:
    """Sets the mesh of sharded parameters, so that kernels know how their arrays are split."""
    mesh = mesh_of(params)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def on_its_mesh(function: F) -> F:
    """Wraps a function of a model: it runs with the mesh of the model's parameters set."""

    @functools.wraps(function)
    def run(model, *args, **options):
        with mesh_in_use(model.params):
            return function(model, *args, **options)

    return run  # pyright: ignore[reportReturnType]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays with a leading batch axis, of any rank."""
    return sharding(("batch",), mesh)


def place_rows(rows: np.ndarray, like: jax.sharding.Sharding) -> jax.Array:
    """Puts a batch on the devices, split over the mesh of `like`.

    Without a mesh, or where the rows do not divide evenly, the compiler places the batch.
    """
    if not isinstance(like, NamedSharding):
        return jnp.asarray(rows)
    mesh = like.mesh
    ways = math.prod(mesh.shape.get(name, 1) for name in RULES["batch"])
    if len(rows) % ways or not isinstance(mesh, Mesh):
        return jnp.asarray(rows)
    return jax.device_put(rows, batch_sharding(mesh))
