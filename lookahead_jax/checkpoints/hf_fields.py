"""Typed access to the fields of a config.json, and fields that a family must not carry."""

from collections.abc import Mapping
from typing import Any

from lookahead_jax.checkpoints.hf_families import FAMILIES

_MAX_INT = 2**31 - 1  # sizes and positions are 32-bit integers

# Fields that change what a model computes, and the families whose code in transformers 5.24 reads
# them. Elsewhere transformers ignores them without a word; a file that sets one to anything but a
# neutral value belongs to another architecture, or was written by mistake.
_GEMMA = ("gemma2", "gemma3_text")
_QWEN = ("qwen2", "qwen3", "qwen3_moe")
_MIXTURES = tuple(name for name, family in FAMILIES.items() if family.experts)
_READ_BY: dict[str, tuple[str, ...]] = {
    "layer_types": ("mistral", "qwen2", "qwen3", "smollm3", "gpt_oss", *_GEMMA),
    "sliding_window": ("mistral", "mixtral", "phi3", "smollm3", "gpt_oss", *_QWEN, *_GEMMA),
    "use_sliding_window": ("smollm3", *_QWEN),
    "max_window_layers": ("qwen2", "qwen3"),
    "sliding_window_pattern": ("gemma3_text",),
    "_sliding_window_pattern": ("gemma3_text",),
    "query_pre_attn_scalar": _GEMMA,
    "attn_logit_softcapping": ("gemma2",),
    "final_logit_softcapping": _GEMMA,
    "rope_local_base_freq": ("gemma3_text",),
    "hidden_activation": _GEMMA,
    "use_bidirectional_attention": _GEMMA,
    "no_rope_layer_interval": ("smollm3",),
    "no_rope_layers": ("smollm3",),
    "embedding_multiplier": ("granite",),
    "residual_multiplier": ("granite",),
    "attention_multiplier": ("granite",),
    "logits_scaling": ("granite",),
    "swiglu_alpha": ("gpt_oss",),
    "swiglu_limit": ("gpt_oss",),
    # Of families that are not supported at all.
    "alibi": (),
    "attention_chunk_size": (),
    "attn_temperature_tuning": (),
    "clip_qkv": (),
    "is_causal": (),
    "logit_scale": (),
    "num_experts": _MIXTURES,
    "num_kv_shared_layers": (),
    "num_local_experts": _MIXTURES,
    "parallel_attn": (),
    "qk_layernorm": (),
    "qk_norm": (),
    "rope_interleaved": (),
    "rotary_pct": (),
    "scale_depth": (),
    "scale_emb": (),
    "use_qk_norm": (),
}
# Values that change nothing, besides null and false.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "num_kv_shared_layers": (0,),
    "rotary_pct": (1.0,),
    "residual_multiplier": (1.0,),
    "embedding_multiplier": (1.0,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "scale_emb": (1.0,),
}


class JsonFields:
    """Typed access to a JSON object: a wrong type is an error that names the field."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def optional(self, name: str, kind: type) -> Any:
        """The value, or None if it is missing or null; integers also serve as floats."""
        value = self.values.get(name)
        # Bounds keep an absurd value from overflowing arithmetic before it meets a check.
        bound = 1e15 if kind is float else _MAX_INT
        if isinstance(value, int | float) and not abs(value) <= bound:
            raise ValueError(f"{self.where}: {name} is out of range: {value}")
        if kind is float and type(value) is int:
            value = float(value)
        if value is not None and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            raise ValueError(f"{self.where}: {name} must be of type {kind.__name__}, got {value!r}")
        return value

    def required(self, name: str, kind: type) -> Any:
        """The value; ValueError if it is missing or null."""
        value = self.optional(name, kind)
        if value is None:
            raise ValueError(f"{self.where}: {name} is missing")
        return value

    def floats(self, name: str) -> tuple[float, ...] | None:
        """A list of numbers, or None if it is missing or null."""
        values = self.optional(name, list)
        if values is None:
            return None
        return tuple(JsonFields({name: v}, self.where).required(name, float) for v in values)


def refuse_foreign_fields(fields: JsonFields, model_type: str) -> None:
    """Raises ValueError for a field of another family whose effect would be lost."""
    for name, families in _READ_BY.items():
        value = fields.values.get(name)
        if model_type in families or value is None:
            continue
        if not _is_neutral(name, value, fields.values, model_type):
            raise ValueError(
                f"{fields.where}: {name} is {value!r}, which {model_type} models do not have; if "
                "this model was trained without it, remove the field from config.json"
            )


def _is_neutral(name: str, value: Any, fields: Mapping[str, Any], model_type: str) -> bool:
    """Whether the model computes the same with the field and without it."""
    window = fields.get("sliding_window")
    has_windows = model_type in _READ_BY["sliding_window"] and window is not None
    if model_type in _READ_BY["use_sliding_window"]:
        has_windows &= fields.get("use_sliding_window") is not False
    match name:
        case "layer_types":
            kind = "sliding_attention" if has_windows else "full_attention"
            return isinstance(value, list) and all(entry == kind for entry in value)
        case "sliding_window":
            positions = fields.get("max_position_embeddings")
            wide = isinstance(value, int) and isinstance(positions, int) and value >= positions
            return wide or fields.get("use_sliding_window") is False
        case "use_sliding_window":
            return value is True or not has_windows
        case "max_window_layers":
            return value == 0 or not has_windows
        case "sliding_window_pattern" | "_sliding_window_pattern":
            own = model_type == "gemma2" and value == 2
            return own or not has_windows or fields.get("layer_types") is not None
        case "query_pre_attn_scalar":
            return value == fields.get("head_dim")
        case "hidden_activation":
            return value == fields.get("hidden_act")
        case "rope_local_base_freq":
            return value == fields.get("rope_theta")
        case "is_causal":
            return value is True
    return value is False or any(value == neutral for neutral in _NEUTRAL.get(name, ()))
