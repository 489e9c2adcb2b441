"""Which implementation of an operation runs, and on which part of its arguments.

Letters: B batch, N query heads, K KV heads, F MLP, X experts.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax.sharding import AxisType, PartitionSpec

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu", "llvm_cpu"]
_AXES = {
    "B": ("data", "fsdp"),
    "K": ("tensor",),
    "N": ("tensor",),
    "F": ("tensor",),
    "X": ("expert",),
}


def target_platform() -> str:
    """The platform to compile for: that of the mesh in use, else the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def placed() -> bool:
    """Whether kernels know the devices they run on: a mesh is in use, or there is one device.

    XLA cannot partition a kernel, so on several devices `per_shard` does it, and needs the mesh.
    """
    return not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1


def preferred(head_dim: int) -> Implementation:
    """The default implementation: the kernels on TPU and CPU, XLA elsewhere.

    It is XLA, too, on several TPU devices without a mesh in use (see `placed`), and for head dims
    whose keys XLA stores in another layout than the kernels read: these would be copied first.
    """
    if target_platform() == "cpu":
        return "llvm_cpu"
    fits = target_platform() == "tpu" and (head_dim == 64 or head_dim % 128 == 0)
    return "pallas_tpu" if fits and placed() else "xla"


@functools.cache
def log_once(message: str) -> None:
    """Logs a reason for falling back, once per process."""
    logging.getLogger(__name__).debug(message)


def choose(
    implementation: Implementation | None,
    head_dim: int,
    unsupported: Callable[[Implementation], str | None],
) -> Implementation:
    """The implementation to run: the named one, else the preferred one, else XLA.

    `unsupported` returns why an implementation does not support the arguments, or None. A named
    one that does not raises NotImplementedError. Falling back to XLA is logged once.
    """
    name = preferred(head_dim) if implementation is None else implementation
    reason = None if name == "xla" else unsupported(name)
    if reason is None:
        return name
    if implementation is not None:
        raise NotImplementedError(f"{name}: {reason}")
    log_once(f"{name} is not used: {reason}")
    return "xla"


def per_shard(
    local: Callable[..., Any],
    arrays: Sequence[jax.Array | None],
    letters: Sequence[str],
    out_letters: Sequence[str],
) -> Any:
    """`local(*arrays)` on each device's rows and heads, for kernels that XLA cannot partition.

    `letters` names the axes of each array, one letter each: "B" is split over the mesh axes data
    and fsdp, "K", "N" and "F" over tensor, "X" over expert, others over nothing. An axis of size
    1 beside longer ones of its letter (positions shared by all heads) is not split. Without a mesh,
    or where its axes do not divide the rows or heads, nothing is split. Axes that are manual
    already are left alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    }
    if not free:
        return local(*arrays)
    sizes: dict[str, set[int]] = {letter: {1} for letter in _AXES}
    for array, names in zip(arrays, letters, strict=True):
        for i, name in enumerate(names):
            if array is not None and name in _AXES:
                sizes[name].add(array.shape[i])

    def split(letter: str) -> tuple[str, ...] | None:
        wanted = tuple(a for a in _AXES.get(letter, ()) if a in free)
        ways = math.prod(mesh.shape[a] for a in wanted)
        together = {
            n for name, axes in _AXES.items() if axes == _AXES.get(letter) for n in sizes[name]
        }
        fits = all(n == 1 or n % ways == 0 for n in together)
        return wanted if wanted and fits and max(sizes[letter]) > 1 else None

    def spec(names: str, array: jax.Array | None) -> PartitionSpec:
        whole = [array is not None and array.shape[i] == 1 for i in range(len(names))]
        return PartitionSpec(
            *(None if one else split(name) for name, one in zip(names, whole, strict=True))
        )

    in_specs = tuple(spec(n, a) for n, a in zip(letters, arrays, strict=True))
    out_specs = [spec(n, None) for n in out_letters]
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=tuple(out_specs) if len(out_specs) > 1 else out_specs[0],
        axis_names=free,
        check_vma=False,
    )
    return run(*arrays)
