"""A digest that identifies a base model, to match lookahead modules and caches to it."""

import hashlib
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lookahead_jax.model.params import Params
from lookahead_jax.model.quantization import FINGERPRINT_SAMPLES, QuantizedWeight


def fingerprint(params: Params, *, through: DTypeLike | None = None) -> str:
    """A hex digest that identifies a base model, to match lookahead modules and caches to it.

    It covers the names, the shapes and a fixed sample of the values of every parameter and layer,
    rounded to bfloat16. A checkpoint has the same fingerprint as float32 or bfloat16, stacked or
    not, sharded or not, with weights rounded to int8 or not. As float16 it has another one: that of
    the float32 values rounded `through` float16 first.
    """
    layers = params["layers"]
    if isinstance(layers, tuple):
        by_name = {name: [layer[name] for layer in layers] for name in layers[0]}
    else:
        by_name = {
            name: [jax.tree.map(lambda x, i=i: x[i], a) for i in range(a.shape[0])]
            for name, a in layers.items()
        }
    named = [(name, [leaf]) for name, leaf in params.items() if name != "layers"]
    named += [(f"layers.{name}", leaves) for name, leaves in by_name.items()]
    digest = hashlib.sha256()
    for name, leaves in sorted(named, key=lambda item: item[0]):
        digest.update(f"{name} {len(leaves)} {leaves[0].shape}".encode())
        for values in leaves:
            sample = _sample(values)
            sample = sample if through is None else sample.astype(through)
            digest.update(sample.astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


def sample_of(values: np.ndarray | jax.Array) -> Any:
    """The [FINGERPRINT_SAMPLES] values of a parameter of one layer that its fingerprint covers."""
    # Multiples of the golden ratio modulo the size: evenly spread and the same every time.
    steps = np.arange(FINGERPRINT_SAMPLES, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    index = np.unravel_index((steps % np.uint64(values.size)).astype(np.int64), values.shape)
    return values[tuple(i.astype(np.int32) for i in index)]


def _sample(values: jax.Array | QuantizedWeight) -> np.ndarray:
    sampled = values.sample if isinstance(values, QuantizedWeight) else sample_of(values)
    if isinstance(values, jax.Array) and isinstance(values.sharding, NamedSharding):
        everywhere = NamedSharding(values.sharding.mesh, PartitionSpec())
        sampled = jax.device_put(sampled, everywhere)
    return np.asarray(sampled)
