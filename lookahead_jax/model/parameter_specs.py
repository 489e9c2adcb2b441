"""The table of parameters: logical axes and checkpoint tensors, for every family."""

import dataclasses
from typing import Literal

from lookahead_jax.model.config import ModelConfig

WeightType = Literal["int8"]


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
