"""A digest that identifies a base model, to match lookahead modules and caches to it."""

import hashlib
import math
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
    named = {name: (1, a.shape, _sample(a)) for name, a in params.items() if name != "layers"}
    if isinstance(layers, tuple):
        for name, first in layers[0].items():
            samples = np.stack([_sample(layer[name]) for layer in layers])
            named[f"layers.{name}"] = (len(layers), first.shape, samples)
    else:
        for name, a in layers.items():
            named[f"layers.{name}"] = (a.shape[0], a.shape[1:], _sample(a, lead=1))
    digest = hashlib.sha256()
    for name, (count, its_shape, sample) in sorted(named.items()):
        digest.update(f"{name} {count} {its_shape}".encode())
        sample = sample if through is None else sample.astype(through)
        digest.update(sample.astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


def sample_of(values: np.ndarray | jax.Array, lead: int = 0) -> Any:
    """The [FINGERPRINT_SAMPLES] values of a parameter of one layer that its fingerprint covers.

    With `lead`, those of every entry of that many leading axes.
    """
    # Multiples of the golden ratio modulo the size: evenly spread and the same every time.
    size = math.prod(values.shape[lead:])
    steps = np.arange(FINGERPRINT_SAMPLES, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    index = np.unravel_index((steps % np.uint64(size)).astype(np.int64), values.shape[lead:])
    return values[(slice(None),) * lead + tuple(i.astype(np.int32) for i in index)]


def _sample(values: jax.Array | QuantizedWeight, lead: int = 0) -> np.ndarray:
    if isinstance(values, QuantizedWeight):
        return _on_host(values.sample, values.sample.sharding)
    if _is_host_memory(values):
        return sample_of(np.asarray(values), lead)  # a view; JAX would compile a program per shape
    return _on_host(sample_of(values, lead), values.sharding)


def _is_host_memory(values: jax.Array) -> bool:
    devices = values.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _on_host(sampled: jax.Array, sharding: jax.sharding.Sharding) -> np.ndarray:
    if isinstance(sharding, NamedSharding):
        sampled = jax.device_put(sampled, NamedSharding(sharding.mesh, PartitionSpec()))
    return np.asarray(sampled)
