"""The parameters: one table gives their shapes, initial values, shardings and checkpoint names.

The tree is a nested dict. `layers` is stacked: every leaf has a leading layer axis.

    {"embed": [V, D], "layers": {"q": [L, D, N, H], ...}, "final_norm": [D], "lm_head": [V, D]}

`unstack` turns `layers` into a tuple of per-layer dicts, which the decoder also accepts.
"""

import dataclasses
import hashlib
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.quantization import QuantizedWeight, Weight

Params = dict[str, Any]
Index = tuple[slice, ...]
WeightType = Literal["int8"]
FINGERPRINT_SAMPLES = 256  # per parameter and layer; changing it changes every fingerprint
# Axes of matrices that `layers.linears`, `decoder.embed` and `decoder.logits` multiply with.
_QUANTIZED_AXES = {"layer", "vocab", "embed", "heads", "kv_heads", "head_dim", "mlp"}


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """One parameter.

    Its tensor in a Hugging Face checkpoint is [rows, *columns] (of a matrix: [out, in]). The rows
    of a fused tensor consist of several parts, and this parameter is number `part`. Each part and
    the columns are products of logical axes, so one rule splits, permutes and slices every tensor.
    """

    axes: tuple[str, ...]
    """Logical axis of each dimension; "layer" first for stacked parameters."""
    tensor: str
    """Checkpoint name; its fields {layer} and {expert} are axes with one tensor per entry."""
    parts: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...] = ()
    part: int = 0

    @property
    def rows(self) -> tuple[str, ...]:
        return self.parts[self.part]

    @property
    def stacked(self) -> bool:
        """Whether the parameter has one entry per layer."""
        return self.axes[0] == "layer"

    @property
    def lead(self) -> tuple[str, ...]:
        """The leading axes that have one tensor per entry."""
        return tuple(axis for axis in self.axes[:2] if f"{{{axis}}}" in self.tensor)

    def tensor_at(self, place: tuple[int, ...]) -> str:
        """Checkpoint name of the tensor at an index of the leading axes."""
        return self.tensor.format(**dict(zip(self.lead, place, strict=True)))

    def quantized(self, weights: WeightType | None) -> bool:
        """Whether this parameter is a `QuantizedWeight` under the option `weights`."""
        return weights is not None and bool(self.columns)

    @property
    def output_axes(self) -> tuple[str, ...]:
        """Logical axes of a matrix's outputs, "layer" first if it is stacked."""
        return tuple(axis for axis in self.axes if axis not in self.columns)

    @property
    def sample_axes(self) -> tuple[str, ...]:
        """Logical axes of `QuantizedWeight.sample` without the last, which has no name."""
        return self.axes[:1] if self.stacked else ()


def parameter_specs(config: ModelConfig) -> dict[str, ParameterSpec]:
    """The table of this model: parameter path ("embed", "layers.q", ...) -> `ParameterSpec`.

    It is long because it is a table: one entry for each parameter that a family may have.
    """
    heads, kv_heads = ("heads", "head_dim"), ("kv_heads", "head_dim")
    attn, mlp = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
    norm = "model.layers.{layer}.%s_layernorm.weight"

    def dense(name: str, rows: tuple[str, ...], columns: tuple[str, ...]) -> ParameterSpec:
        return ParameterSpec(("layer", *columns, *rows), name + "_proj.weight", (rows,), columns)

    def vector(name: str, *rows: str) -> ParameterSpec:
        return ParameterSpec(("layer", *rows), name, (rows,))

    layers = {
        "q": dense(attn + "q", heads, ("embed",)),
        "k": dense(attn + "k", kv_heads, ("embed",)),
        "v": dense(attn + "v", kv_heads, ("embed",)),
        "o": dense(attn + "o", ("embed",), heads),
        "gate": dense(mlp + "gate", ("mlp",), ("embed",)),
        "up": dense(mlp + "up", ("mlp",), ("embed",)),
        "down": dense(mlp + "down", ("embed",), ("mlp",)),
    }
    fused = []
    if config.model_type == "phi3":
        fused.append(("qkv", attn + "qkv"))
    if config.model_type in ("phi3", "glm", "glm4"):
        fused.append((("gate", "up"), mlp + "gate_up"))
    for names, tensor in fused:
        parts = tuple(layers[name].rows for name in names)
        for part, name in enumerate(names):
            layers[name] = dataclasses.replace(
                layers[name], tensor=tensor + "_proj.weight", parts=parts, part=part
            )
    if config.qkv_bias:
        layers["q_bias"] = vector(attn + "q_proj.bias", *heads)
        layers["k_bias"] = vector(attn + "k_proj.bias", *kv_heads)
        layers["v_bias"] = vector(attn + "v_proj.bias", *kv_heads)
    if config.o_bias:
        layers["o_bias"] = vector(attn + "o_proj.bias", "embed")
    if config.attn_sinks:
        layers["sinks"] = vector(attn + "sinks", "heads")
    if config.qk_norm:
        q, k = (heads, kv_heads) if config.qk_norm_joint else (("head_dim",), ("head_dim",))
        layers["q_norm"] = vector(attn + "q_norm.weight", *q)
        layers["k_norm"] = vector(attn + "k_norm.weight", *k)
    if config.experts is not None:
        layers |= _expert_specs(config)
    if config.mlp_bias:
        layers["gate_bias"] = vector(mlp + "gate_proj.bias", "mlp")
        layers["up_bias"] = vector(mlp + "up_proj.bias", "mlp")
        layers["down_bias"] = vector(mlp + "down_proj.bias", "embed")
    for name, tensor in _norm_tensors(config).items():
        layers[name] = vector(norm % tensor, "embed")

    table = ("vocab", "embed")
    top = {
        "embed": ParameterSpec(table, "model.embed_tokens.weight", (("vocab",),), ("embed",)),
        "final_norm": ParameterSpec(("embed",), "model.norm.weight", (("embed",),)),
    }
    if not config.tie_embeddings:
        top["lm_head"] = ParameterSpec(table, "lm_head.weight", (("vocab",),), ("embed",))
    return top | {f"layers.{name}": spec for name, spec in layers.items()}


def _norm_tensors(config: ModelConfig) -> dict[str, str]:
    """The norms of a layer and their names in a checkpoint, which depend on where they stand."""
    before = {"attn_norm": "input", "mlp_norm": "post_attention"}
    after: dict[str, str] = {}
    if config.model_type == "glm4":
        after = {"attn_post_norm": "post_self_attn", "mlp_post_norm": "post_mlp"}
    elif config.post_norms:
        before["mlp_norm"] = "pre_feedforward"
        after = {"attn_post_norm": "post_attention", "mlp_post_norm": "post_feedforward"}
    return (before if config.pre_norms else {}) | after


# By model_type: the router, the experts, and the names of gate, up and down in an expert.
_EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp.gate", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    # Its checkpoints hold all experts of a layer in one tensor: checkpoints/expert_tensors.py.
    "gpt_oss": ("mlp.router", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}


def _expert_specs(config: ModelConfig) -> dict[str, ParameterSpec]:
    """A router and stacks of experts instead of one MLP."""
    router, experts, names = _EXPERT_NAMES[config.model_type]
    prefix = "model.layers.{layer}."
    specs = {
        "router": ParameterSpec(
            ("layer", "embed", "expert"), f"{prefix}{router}.weight", (("expert",),), ("embed",)
        )
    }
    for name, its, (rows, columns) in zip(
        ("gate", "up", "down"), names, (("mlp", "embed"),) * 2 + (("embed", "mlp"),), strict=True
    ):
        specs[name] = ParameterSpec(
            ("layer", "expert", columns, rows),
            f"{prefix}{experts}.{{expert}}.{its}.weight",
            ((rows,),),
            (columns,),
        )
    if config.experts is not None and config.experts.bias:
        biases = {
            f"{name}_bias": dataclasses.replace(
                spec,
                axes=(*spec.axes[:-2], spec.axes[-1]),
                tensor=spec.tensor.removesuffix("weight") + "bias",
                columns=(),
            )
            for name, spec in specs.items()
        }
        specs |= biases
    return specs


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Size of each logical axis."""
    return {
        "layer": config.num_layers,
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.mlp_dim,
        "expert": 1 if config.experts is None else config.experts.count,
    }


def shape(axes: tuple[str, ...], config: ModelConfig) -> tuple[int, ...]:
    """Sizes of logical axes."""
    sizes = axis_sizes(config)
    return tuple(sizes[axis] for axis in axes)


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


def _inner_axes(spec: ParameterSpec) -> tuple[str, ...]:
    return spec.axes[len(spec.lead) :]


def _outermost(by_axis: dict[str, slice], axes: tuple[str, ...], config: ModelConfig) -> slice:
    """Slice of the merged dimension `axes` that covers the slice of its first axis."""
    inner = math.prod(shape(axes[1:], config))
    first = by_axis[axes[0]]
    return slice(first.start * inner, first.stop * inner)


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
