"""Where arrays live: a mesh of data, fsdp and tensor axes, and one table of rules.

Code names the logical axes of its arrays ("embed", "heads", "batch", ...); only this table knows
what becomes of them on a mesh.
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
from lookahead_jax.model.params import Params, axis_sizes, parameter_specs, tree

F = TypeVar("F", bound=Callable[..., Any])
MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "layer": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
}


def make_mesh(
    *,
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all `devices` (default: all there are) with axes data, fsdp, tensor.

    `data` None takes the devices that the other two leave.

    Raises:
      ValueError: when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data is None:
        data = len(devices) // max(fsdp * tensor, 1)
    if min(data, fsdp, tensor) < 1 or data * fsdp * tensor != len(devices):
        raise ValueError(
            f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} does not use "
            f"exactly the {len(devices)} devices present"
        )
    # Auto: the default, Explicit, rejects a plain lookup in a sharded embedding table.
    auto = (AxisType.Auto,) * len(MESH_AXES)
    # As jax.make_mesh does, but on every kind of TPU: 8 chips of a 4x4x4 slice may be an axis too.
    arranged = mesh_utils.create_device_mesh(
        (data, fsdp, tensor), devices, allow_split_physical_axes=True
    )
    return Mesh(arranged, MESH_AXES, axis_types=auto)


def partition_spec(axes: Sequence[str | None], mesh: Mesh) -> PartitionSpec:
    """The rules applied to an array's logical axes; None is an axis that is never split.

    Mesh axes that `mesh` lacks split nothing, so a mesh of ("data", "tensor") works too.

    Raises:
      ValueError: for a logical axis that the table does not know.
    """
    entries = []
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(f"unknown logical axis {axis!r}; known: {', '.join(RULES)}")
        split = tuple(name for name in RULES[axis] if name in mesh.axis_names) if axis else ()
        entries.append(split if len(split) > 1 else split[0] if split else None)
    return PartitionSpec(*entries)


def sharding(axes: Sequence[str | None], mesh: Mesh) -> NamedSharding:
    """`partition_spec` on its mesh."""
    return NamedSharding(mesh, partition_spec(axes, mesh))


def param_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """The parameter tree with a `NamedSharding` for each leaf.

    Raises:
      ValueError: when a size of the model is not a multiple of the mesh axes that split it.
    """
    used = {axis for spec in parameter_specs(config).values() for axis in spec.axes}
    for axis, size in axis_sizes(config).items():
        ways = math.prod(mesh.shape.get(name, 1) for name in RULES[axis]) if axis in used else 1
        if size % ways:
            raise ValueError(
                f"{axis} has size {size}, not a multiple of {ways}, the mesh's "
                f"{' x '.join(RULES[axis])}; choose a smaller {RULES[axis][-1]} axis"
            )
    return tree({path: sharding(spec.axes, mesh) for path, spec in parameter_specs(config).items()})


def mesh_of(params: Params) -> Mesh | None:
    """The mesh of sharded parameters; None where they are on one device."""
    placed = params["embed"].sharding
    mesh = placed.mesh if isinstance(placed, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def mesh_in_use(params: Params) -> contextlib.AbstractContextManager[Any]:
    """Sets the mesh of sharded parameters, so that kernels know what they are split over."""
    mesh = mesh_of(params)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def on_its_mesh(function: F) -> F:
    """A function of a model, with the mesh of the model's parameters in use."""

    @functools.wraps(function)
    def run(model, *args, **options):
        with mesh_in_use(model.params):
            return function(model, *args, **options)

    return run  # pyright: ignore[reportReturnType]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays with a leading batch axis, whatever follows it."""
    return sharding(("batch",), mesh)


def place_rows(rows: np.ndarray, like: jax.sharding.Sharding) -> jax.Array:
    """A batch on the device, split over the mesh of `like` if there is one that divides it.

    On a single device, or where the rows do not divide, they are left to the compiler.
    """
    if not isinstance(like, NamedSharding):
        return jnp.asarray(rows)
    mesh = like.mesh
    ways = math.prod(mesh.shape.get(name, 1) for name in RULES["batch"])
    if len(rows) % ways or not isinstance(mesh, Mesh):
        return jnp.asarray(rows)
    return jax.device_put(rows, batch_sharding(mesh))
