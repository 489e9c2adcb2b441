"""Which implementation of an operation runs, and on which part of its arguments.

Letters: B batch, N query heads, K KV heads.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax.sharding import AxisType, PartitionSpec

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu"]
_AXES = {"B": ("data", "fsdp"), "K": ("tensor",), "N": ("tensor",)}


def target_platform() -> str:
    """What is being compiled for: the devices of the mesh in use, else the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


@functools.cache
def log_once(message: str) -> None:
    """Says a reason for falling back once per process."""
    logging.getLogger(__name__).debug(message)


def per_shard(
    local: Callable[..., Any],
    arrays: Sequence[jax.Array | None],
    letters: Sequence[str],
    out_letters: Sequence[str],
) -> Any:
    """`local(*arrays)` on each device's rows and heads, for kernels that XLA cannot partition.

    `letters` names the axes of each array, one letter each: "B" is split over the mesh axes data
    and fsdp, "K" and "N" over tensor, others over nothing. An axis of size 1 beside longer ones
    of its letter (positions shared by all heads) is not split. Without a mesh, or where its axes
    do not divide the rows or heads, nothing is split. Axes that are manual already are left alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(*arrays)
    free = {n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t != AxisType.Manual}
    sizes = {
        letter: [
            a.shape[names.index(letter)]
            for a, names in zip(arrays, letters, strict=True)
            if a is not None and letter in names
        ]
        for letter in _AXES
    }

    def axes(letter: str, size: int | None) -> tuple[str, ...] | None:
        wanted = tuple(a for a in _AXES.get(letter, ()) if a in free)
        ways = math.prod(mesh.shape[a] for a in wanted)
        lengths = [n for n in sizes.get(letter, []) if n > 1]
        if not wanted or size == 1 or any(n % ways for n in lengths):
            return None
        return wanted

    def spec(names: str, shape: tuple[int, ...] | None) -> PartitionSpec:
        return PartitionSpec(
            *(axes(n, None if shape is None else shape[i]) for i, n in enumerate(names))
        )

    specs = tuple(
        PartitionSpec() if a is None else spec(names, a.shape)
        for a, names in zip(arrays, letters, strict=True)
    )
    out = tuple(spec(names, None) for names in out_letters)
    if not free:
        return local(*arrays)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=specs,
        out_specs=out if len(out) > 1 else out[0],
        axis_names=free,
        check_vma=False,
    )(*arrays)
