"""Reads a Hugging Face `config.json` into a `ModelConfig`.

The field names of transformers 4 (`rope_theta`, `rope_scaling`, `sliding_window_pattern`) and 5
(`rope_parameters`, `layer_types`) are supported. Fields and values that are not supported raise an
error that names them.
"""

from collections.abc import Mapping
from typing import Any

from lookahead_jax.checkpoints.hf_defaults import DEFAULTS
from lookahead_jax.checkpoints.hf_families import FAMILIES, Family
from lookahead_jax.checkpoints.hf_fields import JsonFields, refuse_foreign_fields
from lookahead_jax.checkpoints.hf_layers import rotating_layers, sliding_layers
from lookahead_jax.checkpoints.hf_rope import ropes_from_hf, without_rotation
from lookahead_jax.model.config import Activation, ExpertsConfig, ModelConfig

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_MULTIPLIERS = (  # of Granite
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
)
_MAX_EXPERTS = 1024


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Parses the content of a `config.json`.

    Fields that the file omits take the defaults of transformers 5.23 for its `model_type`.
    Multimodal Gemma 3 (`model_type` gemma3) yields the configuration of its text model, and
    Ministral that of a Mistral whose layers differ in their windows.

    Raises:
      ValueError: naming the field, for an unknown `model_type`, `rope_type` or activation, any
        `quantization_config` but MXFP4 of gpt_oss, a field that only other families have, and
        missing, mistyped or inconsistent values.
    """
    if not isinstance(hf, Mapping):
        raise ValueError(f"config.json must hold an object, got {type(hf).__name__}")
    model_type = hf.get("model_type")
    quantized = hf.get("quantization_config")
    if quantized is not None and not (model_type == "gpt_oss" and _is_mxfp4(quantized)):
        raise ValueError(
            "config.json has a quantization_config; quantized checkpoints (but MXFP4 of gpt_oss) "
            "are not supported, use the unquantized (bfloat16 or float16) weights"
        )
    if model_type == "gemma3":
        text = JsonFields(hf, "config.json").required("text_config", Mapping)
        if text.get("model_type", "gemma3_text") != "gemma3_text":
            raise ValueError(f"config.json: text_config has model_type {text['model_type']!r}")
        # The multimodal wrapper decides about the head; its own default is tied.
        tied = {"tie_word_embeddings": hf.get("tie_word_embeddings", True)}
        return config_from_hf(dict(text) | {"model_type": "gemma3_text"} | tied)
    if model_type == "ministral":  # transformers also reads mistral with layer_types as ministral
        model_type = "mistral"
    if not isinstance(model_type, str) or model_type not in DEFAULTS:
        known = ", ".join([*DEFAULTS, "gemma3", "ministral"])
        raise ValueError(f"unknown model_type {model_type!r}; known: {known}")
    fields = JsonFields(DEFAULTS[model_type] | dict(hf), f"config.json ({model_type})")
    refuse_foreign_fields(fields, model_type)
    return _model_config(fields, model_type)


def _is_mxfp4(quantized: Any) -> bool:
    return isinstance(quantized, Mapping) and quantized.get("quant_method") == "mxfp4"


def _model_config(f: JsonFields, model_type: str) -> ModelConfig:
    """Fields, with the defaults of their family -> the constants of the model."""
    family = FAMILIES[model_type]
    if family.gemma and f.optional("use_bidirectional_attention", bool):
        raise ValueError(f"{f.where}: use_bidirectional_attention is not supported")
    hidden_size, num_heads = (
        f.required(name, int) for name in ("hidden_size", "num_attention_heads")
    )
    num_kv_heads = f.optional("num_key_value_heads", int)
    head_dim = _head_dim(f, hidden_size, num_heads)
    sliding = sliding_layers(f, model_type)
    ropes = ropes_from_hf(f, model_type, head_dim)
    second_rope = tuple(slides and family.two_ropes for slides in sliding)
    if family.windows == "without_rope":
        ropes += (without_rotation(ropes[0]),)
        second_rope = tuple(not rotates for rotates in rotating_layers(f, len(sliding)))
    attention_bias = family.attention_bias and f.required("attention_bias", bool)
    multipliers = {
        name: f.required(name, float) if family.multipliers else None for name in _MULTIPLIERS
    }
    scale = multipliers["attention_multiplier"]
    return ModelConfig(
        model_type=model_type,
        vocab_size=f.required("vocab_size", int),
        hidden_size=hidden_size,
        num_layers=len(sliding),
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=head_dim,
        mlp_dim=f.required(family.mlp_dim, int),
        experts=_experts(f, model_type),
        ropes=ropes,
        layer_rope=tuple(map(int, second_rope)),
        rope_interleaved=family.rope_interleaved,
        layer_window=tuple(
            f.required("sliding_window", int) if slides else None for slides in sliding
        ),
        norm_eps=f.required("rms_norm_eps", float),
        norm_offset=family.gemma,
        norm_rounds_last=family.norm_rounds_last,
        pre_norms=family.pre_norms,
        post_norms=family.post_norms,
        qk_norm=family.qk_norm is not None,
        qk_norm_joint=family.qk_norm == "joint",
        qkv_bias=attention_bias or family.qkv_bias,
        o_bias=attention_bias and family.o_bias,
        mlp_bias=family.mlp_bias and f.required("mlp_bias", bool),
        activation=_activation(f, "hidden_activation" if family.gemma else "hidden_act"),
        embed_scale=hidden_size**0.5 if family.gemma else multipliers["embedding_multiplier"],
        residual_scale=multipliers["residual_multiplier"],
        attn_scale=_query_scale(f, family, head_dim) ** -0.5 if scale is None else scale,
        attn_sinks=family.sinks,
        attn_softcap=f.optional("attn_logit_softcapping", float) if family.gemma else None,
        final_softcap=f.optional("final_logit_softcapping", float) if family.gemma else None,
        logit_divisor=multipliers["logits_scaling"],
        tie_embeddings=f.required("tie_word_embeddings", bool),
        max_position=f.required("max_position_embeddings", int),
    )


def _query_scale(f: JsonFields, family: Family, head_dim: int) -> float:
    """Attention logits are divided by the square root of this."""
    if not family.gemma:
        return float(head_dim)
    scale = f.required("query_pre_attn_scalar", float)
    if scale <= 0:
        raise ValueError(f"{f.where}: query_pre_attn_scalar must be positive, got {scale}")
    return scale


def _head_dim(f: JsonFields, hidden_size: int, num_heads: int) -> int:
    head_dim = f.optional("head_dim", int)
    if head_dim is not None:
        return head_dim
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(f"{f.where}: hidden_size {hidden_size} / {num_heads} heads is not whole")
    return hidden_size // num_heads


def _activation(f: JsonFields, field: str) -> Activation:
    name = f.required(field, str)
    if name not in _ACTIVATIONS:
        raise ValueError(f"{f.where}: unknown {field} {name!r}; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _experts(f: JsonFields, model_type: str) -> ExpertsConfig | None:
    if not FAMILIES[model_type].experts:
        return None
    for name, layers_alike in ("decoder_sparse_step", 1), ("mlp_only_layers", []):
        if (value := f.values.get(name)) not in (None, layers_alike):
            raise ValueError(
                f"{f.where}: {name} is {value!r}; models in which only some layers have experts "
                "are not supported"
            )
    # transformers reads both names, and writes the second one.
    name = "num_experts" if f.values.get("num_experts") is not None else "num_local_experts"
    clamp = None
    if model_type == "gpt_oss":
        clamp = (f.required("swiglu_alpha", float), f.required("swiglu_limit", float))
    count = f.required(name, int)
    if count > _MAX_EXPERTS:
        raise ValueError(f"{f.where}: {name} {count} exceeds {_MAX_EXPERTS}")
    return ExpertsConfig(
        count=count,
        per_token=f.required("num_experts_per_tok", int),
        normalise=model_type != "qwen3_moe" or f.required("norm_topk_prob", bool),
        bias=model_type == "gpt_oss",
        clamp=clamp,
    )
