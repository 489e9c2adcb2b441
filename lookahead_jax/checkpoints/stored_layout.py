"""Where a parameter lies in the tensors of a Hugging Face checkpoint, and what lies there."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.parameter_specs import ParameterSpec, parameter_specs, shape
from lookahead_jax.model.params import Params, leaf
from lookahead_jax.model.quantization import QuantizedWeight

Index = tuple[slice, ...]


def stored_shape(spec: ParameterSpec, config: ModelConfig) -> tuple[int, ...]:
    """Shape of the checkpoint tensor that holds this parameter (of one layer and expert)."""
    rows = sum(math.prod(shape(part, config)) for part in spec.parts)
    return (rows, math.prod(shape(spec.columns, config))) if spec.columns else (rows,)


def stored_index(spec: ParameterSpec, config: ModelConfig, index: Index) -> Index:
    """The smallest contiguous slice of the checkpoint tensor that covers `index`.

    `index` slices the parameter's own dimensions without the leading ones, with explicit bounds.
    """
    by_axis = dict(zip(_inner_axes(spec), index, strict=True))
    above = sum(math.prod(shape(part, config)) for part in spec.parts[: spec.part])
    rows = _outermost(by_axis, spec.rows, config)
    rows = slice(rows.start + above, rows.stop + above)
    return (rows, _outermost(by_axis, spec.columns, config)) if spec.columns else (rows,)


def from_stored(
    spec: ParameterSpec, config: ModelConfig, block: np.ndarray, index: Index
) -> np.ndarray:
    """What `stored_index` selected -> the values at `index` of the parameter."""
    by_axis = dict(zip(_inner_axes(spec), index, strict=True))
    split, inner = [], []
    for axes in (spec.rows, spec.columns):
        for place, axis in enumerate(axes):
            # Only the outermost axis of each group was cut by stored_index.
            bounds = by_axis[axis]
            split.append(bounds.stop - bounds.start if place == 0 else shape((axis,), config)[0])
            inner.append(slice(None) if place == 0 else bounds)
    order = [(*spec.rows, *spec.columns).index(axis) for axis in _inner_axes(spec)]
    return block.reshape(split)[tuple(inner)].transpose(order)


def to_checkpoint(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """The parameters under their Hugging Face tensor names and shapes, on the host.

    Raises ValueError for int8 weights.
    """
    layers = params["layers"]
    if isinstance(layers, tuple):
        params = params | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
    tensors: dict[str, list[np.ndarray]] = {}
    for path, spec in parameter_specs(config).items():
        if isinstance(leaf(params, path), QuantizedWeight):
            raise ValueError("int8 weights cannot be saved: load the checkpoint without weights=")
        values = np.asarray(leaf(params, path))
        order = [_inner_axes(spec).index(axis) for axis in (*spec.rows, *spec.columns)]
        own_shape = (-1, *stored_shape(spec, config)[1:])
        for place in np.ndindex(shape(spec.lead, config)):
            # The table lists the parts of a fused tensor in their stored order.
            parts = tensors.setdefault(spec.tensor_at(place), [])
            parts.append(values[place].transpose(order).reshape(own_shape))
    # safetensors writes the memory of an array unchanged, so the array must be in C order.
    return {name: np.ascontiguousarray(np.concatenate(p)) for name, p in tensors.items()}


def _inner_axes(spec: ParameterSpec) -> tuple[str, ...]:
    return spec.axes[len(spec.lead) :]


def _outermost(by_axis: dict[str, slice], axes: tuple[str, ...], config: ModelConfig) -> slice:
    """Slice of the merged dimension `axes` that covers the slice of its first axis."""
    inner = math.prod(shape(axes[1:], config))
    first = by_axis[axes[0]]
    return slice(first.start * inner, first.stop * inner)
