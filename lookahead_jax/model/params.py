"""The parameters: one table defines their shapes, initialisation, shardings and checkpoint names.

The tree is a nested dict. `layers` is stacked: every leaf has a leading layer axis.

    {"embed": [V, D], "layers": {"q": [L, D, N, H], ...}, "final_norm": [D], "lm_head": [V, D]}

`unstack` turns `layers` into a tuple of per-layer dicts, which the decoder also accepts.
"""

import dataclasses
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lookahead_jax.model.config import ModelConfig

Params = dict[str, Any]
Index = tuple[slice, ...]
FINGERPRINT_SAMPLES = 256  # per parameter; changing it changes all fingerprints


@dataclasses.dataclass(frozen=True)
class Spec:
    """One parameter.

    Its tensor in a Hugging Face checkpoint is [rows, *columns] (of a matrix: [out, in]). Rows of
    a fused tensor are several parts, of which this parameter is number `part`. Each part and the
    columns are products of logical axes, so one rule splits, permutes and slices everything.
    """

    axes: tuple[str, ...]
    """Logical axis of each dimension; "layer" first for stacked parameters."""
    tensor: str
    """Checkpoint name, with a {layer} field for stacked parameters."""
    parts: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...] = ()
    part: int = 0

    @property
    def rows(self) -> tuple[str, ...]:
        return self.parts[self.part]

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layer"


def specs(config: ModelConfig) -> dict[str, Spec]:
    """The table: parameter path ("embed", "layers.q", ...) -> Spec, for this model."""
    heads, kv_heads = ("heads", "head_dim"), ("kv_heads", "head_dim")
    attn, mlp = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
    norm = "model.layers.{layer}.%s_layernorm.weight"
    before_mlp = "pre_feedforward" if config.post_norms else "post_attention"

    def dense(name: str, rows: tuple[str, ...], columns: tuple[str, ...]) -> Spec:
        return Spec(("layer", *columns, *rows), name + "_proj.weight", (rows,), columns)

    def vector(name: str, *rows: str) -> Spec:
        return Spec(("layer", *rows), name, (rows,))

    layers = {
        "attn_norm": vector(norm % "input", "embed"),
        "q": dense(attn + "q", heads, ("embed",)),
        "k": dense(attn + "k", kv_heads, ("embed",)),
        "v": dense(attn + "v", kv_heads, ("embed",)),
        "o": dense(attn + "o", ("embed",), heads),
        "mlp_norm": vector(norm % before_mlp, "embed"),
        "gate": dense(mlp + "gate", ("mlp",), ("embed",)),
        "up": dense(mlp + "up", ("mlp",), ("embed",)),
        "down": dense(mlp + "down", ("embed",), ("mlp",)),
    }
    if config.model_type == "phi3":
        for names, tensor in ("qkv", attn + "qkv"), (("gate", "up"), mlp + "gate_up"):
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
    if config.qk_norm:
        layers["q_norm"] = vector(attn + "q_norm.weight", "head_dim")
        layers["k_norm"] = vector(attn + "k_norm.weight", "head_dim")
    if config.mlp_bias:
        layers["gate_bias"] = vector(mlp + "gate_proj.bias", "mlp")
        layers["up_bias"] = vector(mlp + "up_proj.bias", "mlp")
        layers["down_bias"] = vector(mlp + "down_proj.bias", "embed")
    if config.post_norms:
        layers["attn_post_norm"] = vector(norm % "post_attention", "embed")
        layers["mlp_post_norm"] = vector(norm % "post_feedforward", "embed")

    table = ("vocab", "embed")
    top = {
        "embed": Spec(table, "model.embed_tokens.weight", (("vocab",),), ("embed",)),
        "final_norm": Spec(("embed",), "model.norm.weight", (("embed",),)),
    }
    if not config.tie_embeddings:
        top["lm_head"] = Spec(table, "lm_head.weight", (("vocab",),), ("embed",))
    return top | {f"layers.{name}": spec for name, spec in layers.items()}


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
    }


def shape(axes: tuple[str, ...], config: ModelConfig) -> tuple[int, ...]:
    """Sizes of logical axes."""
    sizes = axis_sizes(config)
    return tuple(sizes[axis] for axis in axes)


def tree(leaves: dict[str, Any]) -> Params:
    """Leaves by path, as in `specs`, -> the nested dict."""
    top = {path: leaf for path, leaf in leaves.items() if "." not in path}
    layers = {path.split(".")[1]: leaf for path, leaf in leaves.items() if "." in path}
    return top | {"layers": layers}


def leaf(params: Params, path: str) -> Any:
    """The leaf of a stacked tree at a path of `specs`."""
    return params["layers"][path.split(".")[1]] if "." in path else params[path]


def abstract_params(config: ModelConfig, dtype: DTypeLike) -> Params:
    """The tree as `jax.ShapeDtypeStruct`s; allocates nothing."""
    table = specs(config).items()
    return tree({path: jax.ShapeDtypeStruct(shape(s.axes, config), dtype) for path, s in table})


def init_params(key: jax.Array, config: ModelConfig, dtype: DTypeLike) -> Params:
    """Random parameters: matrices normal with variance 1 / fan-in, norms identity, biases zero.

    A parameter's values depend on the key and its path only.
    """
    leaves = {}
    for path, spec in specs(config).items():
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
    """The same parameters with `layers` as a tuple of per-layer dicts; identity if it is one."""
    layers = params["layers"]
    if isinstance(layers, tuple):
        return params
    count = layers["attn_norm"].shape[0]
    split = tuple(jax.tree.map(lambda a, i=i: a[i], layers) for i in range(count))
    return params | {"layers": split}


def stored_shape(spec: Spec, config: ModelConfig) -> tuple[int, ...]:
    """Shape of the checkpoint tensor that holds this parameter (of one layer)."""
    rows = sum(math.prod(shape(part, config)) for part in spec.parts)
    return (rows, math.prod(shape(spec.columns, config))) if spec.columns else (rows,)


def stored_index(spec: Spec, config: ModelConfig, index: Index) -> Index:
    """The smallest contiguous slice of the checkpoint tensor that covers `index`.

    `index` slices the parameter's own dimensions without "layer", with explicit bounds.
    """
    by_axis = dict(zip(_inner_axes(spec), index, strict=True))
    above = sum(math.prod(shape(part, config)) for part in spec.parts[: spec.part])
    rows = _outermost(by_axis, spec.rows, config)
    rows = slice(rows.start + above, rows.stop + above)
    return (rows, _outermost(by_axis, spec.columns, config)) if spec.columns else (rows,)


def from_stored(spec: Spec, config: ModelConfig, block: np.ndarray, index: Index) -> np.ndarray:
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
    """The parameters under their Hugging Face tensor names and shapes, on the host."""
    layers = params["layers"]
    if isinstance(layers, tuple):
        params = params | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
    tensors: dict[str, list[np.ndarray]] = {}
    for path, spec in specs(config).items():
        values = np.asarray(leaf(params, path))
        order = [_inner_axes(spec).index(axis) for axis in (*spec.rows, *spec.columns)]
        own_shape = (-1, *stored_shape(spec, config)[1:])
        for layer, value in enumerate(values if spec.stacked else values[None]):
            name = spec.tensor.format(layer=layer)
            # Parts of a fused tensor stand in the table in their stored order.
            tensors.setdefault(name, []).append(value.transpose(order).reshape(own_shape))
    # safetensors writes an array's memory as it lies, so it must lie in C order.
    return {name: np.ascontiguousarray(np.concatenate(p)) for name, p in tensors.items()}


def fingerprint(params: Params, *, through: DTypeLike | None = None) -> str:
    """A hex digest that tells base models apart, to match lookahead modules to their base.

    It covers names, shapes and some fixed entries of every parameter (of every layer), rounded to
    bfloat16: the same checkpoint loaded as float32 or bfloat16, stacked or not,
    sharded or not, has one fingerprint. Loaded as float16 it has another, that of the float32
    values taken `through` float16 first.
    """
    layers = params["layers"]
    if isinstance(layers, tuple):
        by_name = {name: [layer[name] for layer in layers] for name in layers[0]}
    else:
        by_name = {name: [a[i] for i in range(a.shape[0])] for name, a in layers.items()}
    named = [(name, [leaf]) for name, leaf in params.items() if name != "layers"]
    named += [(f"layers.{name}", leaves) for name, leaves in by_name.items()]
    digest = hashlib.sha256()
    for name, leaves in sorted(named, key=lambda item: item[0]):
        digest.update(f"{name} {len(leaves)} {leaves[0].shape}".encode())
        for values in leaves:
            sample = _sample(values, FINGERPRINT_SAMPLES)
            sample = sample if through is None else sample.astype(through)
            digest.update(sample.astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


def _inner_axes(spec: Spec) -> tuple[str, ...]:
    return spec.axes[1:] if spec.stacked else spec.axes


def _outermost(by_axis: dict[str, slice], axes: tuple[str, ...], config: ModelConfig) -> slice:
    """Slice of the merged dimension `axes` that covers the slice of its first axis."""
    inner = math.prod(shape(axes[1:], config))
    first = by_axis[axes[0]]
    return slice(first.start * inner, first.stop * inner)


def _sample(values: jax.Array, samples: int) -> np.ndarray:
    # Multiples of the golden ratio modulo the size: spread out, fixed, no generator involved.
    steps = np.arange(samples, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    index = np.unravel_index((steps % np.uint64(values.size)).astype(np.int64), values.shape)
    sampled = values[tuple(i.astype(np.int32) for i in index)]
    if isinstance(values, jax.Array) and isinstance(values.sharding, NamedSharding):
        everywhere = NamedSharding(values.sharding.mesh, PartitionSpec())
        sampled = jax.device_put(sampled, everywhere)
    return np.asarray(sampled)
