"""Reads a Hugging Face `config.json` into a `ModelConfig`.

The field names of transformers 4 (`rope_theta`, `rope_scaling`, `sliding_window_pattern`) and 5
(`rope_parameters`, `layer_types`) are supported. Fields and values that are not supported raise an
error that names them.
"""

from collections.abc import Mapping
from typing import Any

from lookahead_jax.checkpoints.hf_defaults import DEFAULTS
from lookahead_jax.checkpoints.hf_fields import MIXTURES, JsonFields, refuse_foreign_fields
from lookahead_jax.model.config import Activation, ExpertsConfig, ModelConfig, RopeConfig

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_WITHOUT_WINDOWS = ("llama", "olmo2", "granite", "glm", "glm4")
_WITH_BIAS_FIELD = ("llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "smollm3", "granite")
_WITH_BIAS_FIELD += ("glm", "glm4", "qwen3_moe", "gpt_oss")
_WITH_MLP_BIAS_FIELD = ("llama", "smollm3", "granite")
_WITH_PARTIAL_ROPE = ("phi3", "glm", "glm4")
_MULTIPLIERS = (  # of Granite
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
)
_MAX_LAYERS = 10_000  # a wrong file must not make us build huge tuples
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
    gemma = model_type in ("gemma2", "gemma3_text")
    glm = model_type in ("glm", "glm4")
    if gemma and f.optional("use_bidirectional_attention", bool):
        raise ValueError(f"{f.where}: use_bidirectional_attention is not supported")
    hidden_size, num_heads = (
        f.required(name, int) for name in ("hidden_size", "num_attention_heads")
    )
    num_kv_heads = f.optional("num_key_value_heads", int)
    head_dim = _head_dim(f, hidden_size, num_heads)
    layer_types = _layer_types(f, model_type)
    ropes = _ropes(f, model_type, head_dim)
    second_rope = tuple(sliding and model_type == "gemma3_text" for sliding in layer_types)
    if model_type == "smollm3":
        ropes += (_no_rope(ropes[0]),)
        second_rope = tuple(not rotates for rotates in _rotating_layers(f, len(layer_types)))
    attention_bias = model_type in _WITH_BIAS_FIELD and f.required("attention_bias", bool)
    query_scale = f.required("query_pre_attn_scalar", float) if gemma else float(head_dim)
    if query_scale <= 0:
        raise ValueError(f"{f.where}: query_pre_attn_scalar must be positive, got {query_scale}")
    multipliers = {
        name: f.required(name, float) if model_type == "granite" else None for name in _MULTIPLIERS
    }
    attn_scale = multipliers["attention_multiplier"]
    return ModelConfig(
        model_type=model_type,
        vocab_size=f.required("vocab_size", int),
        hidden_size=hidden_size,
        num_layers=len(layer_types),
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=head_dim,
        mlp_dim=f.required(
            "moe_intermediate_size" if model_type == "qwen3_moe" else "intermediate_size", int
        ),
        experts=_experts(f, model_type),
        ropes=ropes,
        layer_rope=tuple(map(int, second_rope)),
        rope_interleaved=glm,
        layer_window=tuple(
            f.required("sliding_window", int) if sliding else None for sliding in layer_types
        ),
        norm_eps=f.required("rms_norm_eps", float),
        norm_offset=gemma,
        norm_rounds_last=gemma or model_type == "olmo2",
        pre_norms=model_type != "olmo2",
        post_norms=gemma or model_type in ("olmo2", "glm4"),
        qk_norm=model_type in ("qwen3", "qwen3_moe", "gemma3_text", "olmo2"),
        qk_norm_joint=model_type == "olmo2",
        qkv_bias=attention_bias or model_type == "qwen2",
        o_bias=attention_bias and not glm,
        mlp_bias=model_type in _WITH_MLP_BIAS_FIELD and f.required("mlp_bias", bool),
        activation=_activation(f, "hidden_activation" if gemma else "hidden_act"),
        embed_scale=hidden_size**0.5 if gemma else multipliers["embedding_multiplier"],
        residual_scale=multipliers["residual_multiplier"],
        attn_scale=query_scale**-0.5 if attn_scale is None else attn_scale,
        attn_sinks=model_type == "gpt_oss",
        attn_softcap=f.optional("attn_logit_softcapping", float) if gemma else None,
        final_softcap=f.optional("final_logit_softcapping", float) if gemma else None,
        logit_divisor=multipliers["logits_scaling"],
        tie_embeddings=f.required("tie_word_embeddings", bool),
        max_position=f.required("max_position_embeddings", int),
    )


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
    if model_type not in MIXTURES:
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


def _layer_types(f: JsonFields, model_type: str) -> tuple[bool, ...]:
    """Per layer, whether it attends within the sliding window."""
    num_layers = f.required("num_hidden_layers", int)
    if not 1 <= num_layers <= _MAX_LAYERS:
        raise ValueError(f"{f.where}: num_hidden_layers {num_layers} is not in 1..{_MAX_LAYERS}")
    if model_type in _WITHOUT_WINDOWS:
        return (False,) * num_layers
    names = f.optional("layer_types", list)
    if names is not None and model_type != "phi3":
        if len(names) != num_layers or any(
            name not in ("sliding_attention", "full_attention") for name in names
        ):
            raise ValueError(
                f"{f.where}: layer_types must hold {num_layers} times sliding_attention or "
                f"full_attention, got {names}"
            )
        sliding = tuple(name == "sliding_attention" for name in names)
        if any(sliding) and f.values.get("use_sliding_window") is False:
            raise ValueError(
                f"{f.where}: layer_types has sliding_attention, but use_sliding_window is false"
            )
        return sliding
    if model_type in ("mistral", "mixtral", "phi3"):
        return (f.optional("sliding_window", int) is not None,) * num_layers
    if model_type in ("qwen2", "qwen3", "qwen3_moe"):
        windowed = f.required("use_sliding_window", bool) and f.values["sliding_window"] is not None
        if model_type == "qwen3_moe":
            return (windowed,) * num_layers
        first = f.required("max_window_layers", int) if windowed else num_layers
        return tuple(layer >= first for layer in range(num_layers))
    if model_type == "smollm3":  # only layers without RoPE have windows
        windowed = f.required("use_sliding_window", bool) and f.values["sliding_window"] is not None
        return tuple(windowed and not rotates for rotates in _rotating_layers(f, num_layers))
    period = 2
    if model_type == "gemma3_text":
        names = ("sliding_window_pattern", "_sliding_window_pattern")
        period = next((f.required(n, int) for n in names if f.values.get(n) is not None), 6)
    if period < 1:
        raise ValueError(f"{f.where}: sliding_window_pattern must be positive, got {period}")
    return tuple((layer + 1) % period != 0 for layer in range(num_layers))


def _rotating_layers(f: JsonFields, num_layers: int) -> tuple[bool, ...]:
    """Per layer of SmolLM3, whether it has RoPE."""
    flags = f.optional("no_rope_layers", list)
    if flags is None:
        interval = f.required("no_rope_layer_interval", int)
        if interval < 1:
            raise ValueError(f"{f.where}: no_rope_layer_interval must be positive, got {interval}")
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if len(flags) < num_layers or any(flag not in (0, 1) for flag in flags):
        raise ValueError(
            f"{f.where}: no_rope_layers must hold a 1 (with RoPE) or 0 for each of {num_layers} "
            f"layers, got {flags}"
        )
    return tuple(flag == 1 for flag in flags[:num_layers])


def _ropes(f: JsonFields, model_type: str, head_dim: int) -> tuple[RopeConfig, ...]:
    # A rope_scaling wins over rope_parameters where both are present, as in transformers.
    scaling = f.optional("rope_scaling", Mapping) or {}
    parameters = f.optional("rope_parameters", Mapping) or {}
    nested = {"full_attention", "sliding_attention"} & set(parameters)
    if model_type != "gemma3_text":
        if nested:
            raise ValueError(f"{f.where}: rope_parameters per layer type are not supported")
        return (_rope(f, scaling or parameters, "rope_theta", model_type, head_dim),)
    if parameters and not nested:
        raise ValueError(f"{f.where}: rope_parameters must be nested by layer type")
    layered = JsonFields(parameters, f"{f.where} rope_parameters")
    both = (layered.optional(n, Mapping) or {} for n in ("full_attention", "sliding_attention"))
    full, sliding = both
    return (
        _rope(f, dict(full) | dict(scaling), "rope_theta", model_type, head_dim),
        _rope(f, sliding, "rope_local_base_freq", model_type, head_dim),
    )


def _no_rope(rope: RopeConfig) -> RopeConfig:
    return RopeConfig(kind="none", theta=rope.theta, dim=rope.dim, max_position=rope.max_position)


def _rope(
    f: JsonFields, parameters: Mapping[str, Any], theta_field: str, model_type: str, head_dim: int
) -> RopeConfig:
    r = JsonFields(parameters, f"{f.where} rope")
    kind = r.optional("rope_type", str) or r.optional("type", str) or "default"
    if model_type == "phi3" and kind in ("su", "yarn"):  # what Phi-3 called longrope at first
        kind = "longrope"
    if kind == "none":  # ours, for the layers of SmolLM3 that have no RoPE
        raise ValueError(f"{f.where}: unknown rope_type 'none'")
    partial = r.optional("partial_rotary_factor", float)
    if partial is None:
        partial = f.required("partial_rotary_factor", float)
    if partial != 1.0 and model_type not in _WITH_PARTIAL_ROPE:
        raise ValueError(f"{f.where}: partial_rotary_factor is not supported")
    theta = r.optional("rope_theta", float)
    max_position = f.required("max_position_embeddings", int)
    if max_position < 1:
        raise ValueError(f"{f.where}: max_position_embeddings must be positive")
    # The top-level field wins over the one inside the rope object, as in transformers.
    original = (
        f.optional("original_max_position_embeddings", int)
        or r.optional("original_max_position_embeddings", int)
        or max_position
    )
    common = {
        "kind": kind,
        "theta": f.required(theta_field, float) if theta is None else theta,
        "dim": int(head_dim * partial),
        "max_position": max_position,
    }
    factor, attention_factor = (r.optional(n, float) for n in ("factor", "attention_factor"))
    match kind:
        case "linear" | "dynamic":
            return RopeConfig(**common, factor=factor)
        case "llama3":
            return RopeConfig(
                **common,
                factor=factor,
                low_freq_factor=r.optional("low_freq_factor", float),
                high_freq_factor=r.optional("high_freq_factor", float),
                original_max_position=original,
            )
        case "yarn":
            truncate = r.optional("truncate", bool)
            return RopeConfig(
                **common,
                factor=max_position / original if factor is None else factor,
                attention_factor=attention_factor,
                beta_fast=r.optional("beta_fast", float) or 32.0,
                beta_slow=r.optional("beta_slow", float) or 1.0,
                mscale=r.optional("mscale", float),
                mscale_all_dim=r.optional("mscale_all_dim", float),
                truncate=True if truncate is None else truncate,
                original_max_position=original,
            )
        case "longrope":
            return RopeConfig(
                **common,
                factor=max_position / original if factor is None else factor,
                attention_factor=attention_factor,
                short_factor=r.floats("short_factor"),
                long_factor=r.floats("long_factor"),
                original_max_position=original,
            )
    return RopeConfig(**common)
