"""Metadata of a GGUF file -> the content of a Hugging Face `config.json`."""

from typing import Any

import numpy as np

from lookahead_jax.checkpoints.gguf_header import GgufHeader
from lookahead_jax.checkpoints.gguf_tensors import (
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    read_vector,
)

# general.architecture -> model_type. Files of Mistral are llama with a window, of Mixtral llama
# with experts.
_FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "granite": "granite",
    "chatglm": "glm",
    "glm4": "glm4",
    "smollm3": "smollm3",  # files do not name the layers without RoPE: every fourth, the default
}
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
# Keys that are read below, or that change nothing here.
_OTHER = {
    "attention.sliding_window",
    "attention.value_length",
    "expert_feed_forward_length",
    "rope.dimension_count",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "vocab_size",
}
_NEUTRAL = {"rope.scaling.yarn_attn_factor": 1.0, "rope.scaling.yarn_ext_factor": 1.0}
_WINDOW_PATTERN, _WINDOW_THETA = "attention.sliding_window_pattern", "rope.freq_base_swa"
_PATTERNED = ("gemma2", "gemma3", "gpt-oss")  # architectures whose layers differ in their windows
_WITH_BIASES = {  # which of them a file has, its tensors say
    "attention_bias": ("llama", "smollm3", "granite", "glm4", "chatglm"),
    "mlp_bias": ("llama", "smollm3", "granite"),
}
_LLAMA3_FACTORS = (8.0, 32.0)  # of Llama 3.1 and 3.2, whose files hold the result as a tensor
# Gemma files lack the scale of queries. By layers, where it is not the head's size.
_QUERY_SCALES = {("gemma2", 46): 144, ("gemma3", 62): 168}


def hf_config(header: GgufHeader) -> dict[str, Any]:
    """The fields of a `config.json`, for `config_from_hf`.

    Raises:
      ValueError: for an unknown architecture, and for settings that have no counterpart.
    """
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise ValueError(f"unknown general.architecture {architecture!r}; known: {known}")
    prefix = architecture + "."
    settings = {
        name.removeprefix(prefix): _plain(value)
        for name, value in header.metadata.items()
        if name.startswith(prefix)
    }
    unknown = settings.keys() - _FIELDS.keys() - _OTHER - _own_keys(architecture)
    if unknown := sorted(n for n in unknown if n not in _NEUTRAL or settings[n] != _NEUTRAL[n]):
        raise ValueError(f"{architecture} files with {', '.join(unknown)} are not supported")
    if "token_embd.weight" not in header.tensors:
        raise ValueError("it has no token_embd.weight")
    fields = {hf: settings[name] for name, hf in _FIELDS.items() if name in settings}
    fields |= {
        "model_type": _FAMILIES[architecture],
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and not hidden % heads:
        fields.setdefault("head_dim", hidden // heads)
    _check_experts(architecture, settings)
    fields |= _layers(architecture, settings, fields)
    for field, tensors in ("attention_bias", ("attn_q", "attn_qkv")), ("mlp_bias", ("ffn_up",)):
        if architecture in _WITH_BIASES[field]:
            fields[field] = any(f"blk.0.{name}.bias" in header.tensors for name in tensors)
    if architecture == "granite" and settings.get("rope.scaling.finetuned") is False:
        raise ValueError("granite files with rope.scaling.finetuned false have no RoPE")
    if architecture in ("gemma2", "gemma3"):
        scale = _QUERY_SCALES.get((architecture, fields.get("num_hidden_layers", 0)))
        fields["query_pre_attn_scalar"] = scale or fields.get("head_dim")
    return fields | _rope(header, architecture, settings, fields)


def _check_experts(architecture: str, settings: dict[str, Any]) -> None:
    """ValueError if a file with experts leaves out their number, how many act, or their width."""
    if architecture not in ("qwen3moe", "gpt-oss") and not settings.get("expert_count"):
        return
    needed = ["expert_count", "expert_used_count"]
    needed += ["expert_feed_forward_length"] * (architecture != "llama")
    if missing := [name for name in needed if not settings.get(name)]:
        names = ", ".join(f"{architecture}.{name}" for name in missing)
        raise ValueError(f"its experts cannot be read: it has no {names}")


def _own_keys(architecture: str) -> set[str]:
    """Keys that are read for some architectures only."""
    keys = {_WINDOW_PATTERN} if architecture in _PATTERNED else set()
    return keys | ({_WINDOW_THETA} if architecture == "gemma3" else set())


def _layers(architecture: str, settings: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that describe windows and experts."""
    described: dict[str, Any] = {}
    if (window := settings.get("attention.sliding_window")) is not None:
        described["sliding_window"] = window
        if architecture == "llama":
            described["model_type"] = "mistral"
    pattern = settings.get(_WINDOW_PATTERN)
    if isinstance(pattern, np.ndarray):
        names = ("full_attention", "sliding_attention")
        described["layer_types"] = [names[bool(slides)] for slides in pattern]
    elif pattern is not None and architecture == "gemma3":
        described["sliding_window_pattern"] = pattern
    elif pattern not in (None, 2):
        raise ValueError(f"{architecture} files whose {_WINDOW_PATTERN} is not 2 are not supported")
    if fields.get("num_local_experts") in (0, None):  # some files of models without experts say 0
        fields.pop("num_local_experts", None)
        fields.pop("num_experts_per_tok", None)
    width = settings.get("expert_feed_forward_length")
    if "num_local_experts" in fields and architecture == "llama":
        described["model_type"] = "mixtral"
    if architecture == "gpt-oss" and width is not None:
        described["intermediate_size"] = width
    if architecture == "qwen3moe":
        described |= {"moe_intermediate_size": width, "norm_topk_prob": True}
        described["num_experts"] = fields.pop("num_local_experts")  # as published files name it
    return described


def _plain(value: Any) -> Any:
    """Numbers as a config.json has them: float32 1e-5 is stored as 9.99999974e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope(
    header: GgufHeader, architecture: str, settings: dict[str, Any], fields: dict[str, Any]
) -> dict[str, Any]:
    """The fields that describe RoPE."""
    kind, factor = settings.get("rope.scaling.type"), settings.get("rope.scaling.factor")
    if architecture == "gemma3":
        full = {"rope_theta": fields.pop("rope_theta", 1e6)}
        if kind == "linear":
            full |= {"rope_type": "linear", "factor": factor}
        sliding = {"rope_theta": settings.get(_WINDOW_THETA, 1e4), "rope_type": "default"}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}
    scaling: dict[str, Any] = {}
    original = settings.get("rope.scaling.original_context_length")
    if ROPE_FACTORS in header.tensors:
        scaling = _llama3(read_vector(header, ROPE_FACTORS), settings, fields)
    elif LONG_FACTORS in header.tensors:
        scaling = {
            "rope_type": "longrope",
            "long_factor": read_vector(header, LONG_FACTORS).astype(float).tolist(),
            "short_factor": read_vector(header, SHORT_FACTORS).astype(float).tolist(),
        }
    elif kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": factor}
        for name in ("beta_fast", "beta_slow"):
            if (value := settings.get(f"rope.scaling.yarn_{name}")) is not None:
                scaling[name] = value
        if architecture == "gpt-oss":
            scaling["truncate"] = False
    elif kind not in (None, "none"):
        raise ValueError(f"rope.scaling.type {kind!r} is not supported")
    if scaling and original is not None:
        scaling["original_max_position_embeddings"] = original
    if architecture == "gpt-oss" and not scaling:  # the family's default is YaRN
        scaling = {"rope_type": "default"}
    described: dict[str, Any] = {"rope_scaling": scaling} if scaling else {}
    if architecture == "phi3" and original is not None:  # its config.json has a default for it
        described["original_max_position_embeddings"] = original
    rotated = settings.get("rope.dimension_count")
    heads = fields.get("num_attention_heads") or 1
    head = fields.get("head_dim") or fields.get("hidden_size", 0) // heads
    if rotated is not None and head:
        described["partial_rotary_factor"] = rotated / head
    return described


def _llama3(stored: np.ndarray, settings: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The settings of Llama 3.1's RoPE whose factors are those of the tensor."""
    dim = settings.get("rope.dimension_count") or 2 * len(stored)
    theta = fields.get("rope_theta", 10000.0)
    for factor in _LLAMA3_FACTORS:
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        wavelength = 2 * np.pi * theta ** (np.arange(0, dim, 2) / dim)
        smooth = np.clip((8192 / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
        expected = 1.0 / ((1 - smooth) / factor + smooth)
        if expected.shape == stored.shape and np.allclose(expected, stored, rtol=1e-4):
            return scaling
    raise ValueError(f"{ROPE_FACTORS} holds factors of an unknown scaling")
