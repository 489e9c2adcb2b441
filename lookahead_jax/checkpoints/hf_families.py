"""What a `model_type` decides by itself, and which optional fields of config.json it reads."""

import dataclasses
from typing import Literal

Windows = Literal["none", "all", "used", "last", "without_rope", "alternating"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table; the defaults are those of Llama's architecture."""

    windows: Windows = "none"
    """Layers with a sliding window where layer_types does not say it. all: all of them, if
    sliding_window is a number; used: all of them, if use_sliding_window is true too; last: from
    layer max_window_layers on; without_rope: those without RoPE; alternating: all but every
    n-th."""
    layer_types: bool = True
    """Whether a family with windows reads layer_types."""
    gemma: bool = False
    """Gemma's norms (1 + w), embeddings times sqrt(D), soft caps and query_pre_attn_scalar."""
    norm_rounds_last: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: Literal["heads", "joint"] | None = None
    attention_bias: bool = False
    """Whether the field attention_bias is read, for q, k, v and o."""
    qkv_bias: bool = False
    """Whether q, k and v always have a bias."""
    o_bias: bool = True
    """Whether attention_bias is also that of o."""
    mlp_bias: bool = False
    """Whether the field mlp_bias is read."""
    partial_rope: bool = False
    rope_interleaved: bool = False
    two_ropes: bool = False
    """Whether layers with a window have a RoPE of their own (rope_local_base_freq)."""
    multipliers: bool = False
    """Whether Granite's four multipliers are read."""
    sinks: bool = False
    experts: bool = False
    mlp_dim: str = "intermediate_size"


_QWEN3 = Family(windows="last", attention_bias=True, qk_norm="heads")
_GEMMA2 = Family(
    windows="alternating", gemma=True, norm_rounds_last=True, post_norms=True, attention_bias=True
)
_GLM = Family(attention_bias=True, o_bias=False, partial_rope=True, rope_interleaved=True)
FAMILIES: dict[str, Family] = {
    "llama": Family(attention_bias=True, mlp_bias=True),
    "mistral": Family(windows="all"),
    "mixtral": Family(windows="all", experts=True),
    "qwen2": Family(windows="last", qkv_bias=True),
    "qwen3": _QWEN3,
    "qwen3_moe": dataclasses.replace(
        _QWEN3, windows="used", experts=True, mlp_dim="moe_intermediate_size"
    ),
    "gpt_oss": Family(windows="alternating", attention_bias=True, sinks=True, experts=True),
    "gemma2": _GEMMA2,
    "gemma3_text": dataclasses.replace(_GEMMA2, qk_norm="heads", two_ropes=True),
    "phi3": Family(windows="all", layer_types=False, partial_rope=True),
    "smollm3": Family(windows="without_rope", attention_bias=True, mlp_bias=True),
    "granite": Family(attention_bias=True, mlp_bias=True, multipliers=True),
    "glm": _GLM,
    "glm4": dataclasses.replace(_GLM, post_norms=True),
    "olmo2": Family(
        attention_bias=True,
        norm_rounds_last=True,
        pre_norms=False,
        post_norms=True,
        qk_norm="joint",
    ),
}
