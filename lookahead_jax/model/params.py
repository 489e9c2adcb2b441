"""The tree of parameters: shapes, random values, and the layers stacked or apart.

The tree is a nested dict. `layers` is stacked: every leaf has a leading layer axis.

    {"embed": [V, D], "layers": {"q": [L, D, N, H], ...}, "final_norm": [D], "lm_head": [V, D]}

`unstack` turns `layers` into a tuple of per-layer dicts, which the decoder also accepts.
"""

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.parameter_specs import ParameterSpec, WeightType, parameter_specs, shape
from lookahead_jax.model.quantization import FINGERPRINT_SAMPLES, QuantizedWeight, Weight

Params = dict[str, Any]
# Axes of matrices that `layers.linears`, `decoder.embed` and `decoder.logits` multiply with.
_QUANTIZED_AXES = {"layer", "vocab", "embed", "heads", "kv_heads", "head_dim", "mlp"}


def tree(leaves: dict[str, Any]) -> Params:
    """Leaves by path, as in `parameter_specs`, -> the nested dict."""
    top = {path: leaf for path, leaf in leaves.items() if "." not in path}
    layers = {path.split(".")[1]: leaf for path, leaf in leaves.items() if "." in path}
    return top | {"layers": layers}


def leaf(params: Params, path: str) -> Any:
    """The leaf of a stacked tree at a path of `parameter_specs`."""
    return params["layers"][path.split(".")[1]] if "." in path else params[path]


def abstract_params(
    config: ModelConfig, dtype: DTypeLike, weights: WeightType | None = None
) -> Params:
    """The tree with a `jax.ShapeDtypeStruct` for each array; allocates nothing."""

    def abstract(spec: ParameterSpec) -> Any:
        sizes = shape(spec.axes, config)
        if not spec.quantized(weights):
            return jax.ShapeDtypeStruct(sizes, dtype)
        samples = (*shape(spec.sample_axes, config), FINGERPRINT_SAMPLES)
        arrays: Any = (
            jax.ShapeDtypeStruct(sizes, jnp.int8),
            jax.ShapeDtypeStruct(shape(spec.output_axes, config), jnp.float32),
            jax.ShapeDtypeStruct(samples, dtype),
        )
        return QuantizedWeight(*arrays)

    return tree({path: abstract(spec) for path, spec in parameter_specs(config).items()})


def weight_type(weights: str | None, config: ModelConfig) -> WeightType | None:
    """The checked option `weights` for a model.

    Raises ValueError for an unknown value, and if a matrix of the model has no product that reads
    it in eight bits.
    """
    if weights is None:
        return None
    if weights != "int8":
        raise ValueError(f"weights={weights!r} is unknown: give 'int8', or leave it out")
    uncovered = [
        path
        for path, spec in parameter_specs(config).items()
        if spec.columns and not _QUANTIZED_AXES.issuperset(spec.axes)
    ]
    if uncovered:
        raise ValueError(
            f"int8 weights do not cover {', '.join(uncovered)} of {config.model_type} models: "
            "leave weights=int8 (--weights int8) out"
        )
    return "int8"


def init_params(key: jax.Array, config: ModelConfig, dtype: DTypeLike) -> Params:
    """Random parameters: matrices normal with variance 1 / fan-in, norms identity, biases zero.

    The values of a parameter depend only on the key and its path.
    """
    leaves = {}
    for path, spec in parameter_specs(config).items():
        size = shape(spec.axes, config)
        if spec.columns:
            seed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "little")
            normal = jax.random.normal(jax.random.fold_in(key, seed), size, jnp.float32)
            leaves[path] = (normal * math.prod(shape(spec.columns, config)) ** -0.5).astype(dtype)
        else:
            identity = path.endswith("norm") and not config.norm_offset
            leaves[path] = jnp.full(size, 1.0 if identity else 0.0, dtype)
    return tree(leaves)


def unstack(params: Params) -> Params:
    """The parameters with `layers` as a tuple of per-layer dicts; unchanged if it is one."""
    layers = params["layers"]
    if isinstance(layers, tuple):
        return params
    count = layers["q"].shape[0]
    split = tuple(jax.tree.map(lambda a, i=i: a[i], layers) for i in range(count))
    return params | {"layers": split}


def of_all_layers(params: Params, name: str) -> Weight:
    """One parameter of all layers [L, ...]; a copy if the layers are a tuple."""
    layers = params["layers"]
    if not isinstance(layers, tuple):
        return layers[name]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *(p[name] for p in layers))
