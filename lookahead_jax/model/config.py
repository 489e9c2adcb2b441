"""The constants of a model: frozen dataclasses that validate their fields."""

import dataclasses
from typing import Literal, get_args

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "none"]
Activation = Literal["silu", "gelu", "gelu_tanh"]

_REQUIRED_BY_KIND = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position"),
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "original_max_position"),
    "longrope": ("factor", "short_factor", "long_factor", "original_max_position"),
    "none": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Constants of one rotary embedding; a field that its kind does not use is None.

    `dim` is the number of rotated dimensions of a head (all of them unless rotation is partial);
    `short_factor` and `long_factor` have `dim / 2` entries. Where `attention_factor` is None, it
    is derived from the other fields, as `rope.inverse_frequencies` documents. Kind `none` rotates
    by no angle: it is for layers without RoPE (SmolLM3).
    """

    kind: RopeKind
    theta: float
    dim: int
    max_position: int
    original_max_position: int | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    attention_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in _REQUIRED_BY_KIND:
            raise ValueError(f"unknown rope_type {self.kind!r}; known: {sorted(_REQUIRED_BY_KIND)}")
        missing = [name for name in _REQUIRED_BY_KIND[self.kind] if getattr(self, name) is None]
        if missing:
            raise ValueError(f"rope_type {self.kind!r} needs {', '.join(missing)}")
        if self.dim < 2 or self.dim % 2 or (self.kind == "dynamic" and self.dim == 2):
            raise ValueError(f"rope_type {self.kind!r} cannot rotate {self.dim} dimensions")
        if self.theta <= 1 or (self.factor is not None and self.factor <= 0):
            raise ValueError(f"rope theta {self.theta} or factor {self.factor} is out of range")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            raise ValueError("rope high_freq_factor must exceed low_freq_factor")
        if self.max_position < 1 or (self.original_max_position or 2) < 2:
            raise ValueError("rope max_position and original_max_position must be positive")
        if any(factor <= 0 for factor in (self.short_factor or ()) + (self.long_factor or ())):
            raise ValueError("rope short_factor and long_factor must be positive")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is not None and len(factors) != self.dim // 2:
                raise ValueError(f"{name} has {len(factors)} entries, expected {self.dim // 2}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of each layer's MLP: a router sends every row to a few."""

    count: int
    per_token: int
    """Experts that a row is sent to."""
    normalise: bool
    """True: a row's weights are a softmax over its own experts. False: over all experts."""
    bias: bool
    """Whether the router and the experts have biases."""
    clamp: tuple[float, float] | None
    """(alpha, limit): min(gate, limit) * sigmoid(alpha * min(gate, limit)) * (clip(up) + 1), with
    up in -limit .. limit (gpt-oss). None: the gated MLP of `ModelConfig.activation`."""

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.count:
            raise ValueError(f"a token cannot be sent to {self.per_token} of {self.count} experts")
        if self.clamp is not None and not min(self.clamp) > 0:
            raise ValueError(f"swiglu alpha and limit must be positive, got {self.clamp}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything the decoder needs to know about a checkpoint; hashable: a static jit argument."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    """Width of the MLP; with experts, of one expert."""
    experts: ExpertsConfig | None
    ropes: tuple[RopeConfig, ...]
    layer_rope: tuple[int, ...]
    """Per layer, the index of its rope in `ropes`. Gemma 3 has two: 0 global, 1 local; SmolLM3 has
    kind `none` as its second."""
    rope_interleaved: bool
    """Whether RoPE turns dimension 2i with 2i + 1 (GLM-4), not i with i + dim / 2."""
    layer_window: tuple[int | None, ...]
    """Per layer, the number of positions a token attends to (its own included); None: all."""
    norm_eps: float
    norm_offset: bool
    """Whether norms multiply by 1 + w instead of w (Gemma)."""
    norm_rounds_last: bool
    """True: multiply by the weight in float32, then round to the dtype of the activations (Gemma,
    OLMo 2). False: round, then multiply."""
    pre_norms: bool
    """Whether the inputs of attention and MLP are normalised (all families but OLMo 2)."""
    post_norms: bool
    """Whether the outputs of attention and MLP are normalised before the residual sum."""
    qk_norm: bool
    """Whether queries and keys are normalised before RoPE."""
    qk_norm_joint: bool
    """Whether that norm takes all heads of a token together (OLMo 2), not each head by itself."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    activation: Activation
    embed_scale: float | None
    """Factor of the token embeddings, rounded to the dtype of the weights when applied."""
    residual_scale: float | None
    """Factor of the outputs of attention and MLP in the residual sum (Granite); None: 1."""
    attn_scale: float
    attn_sinks: bool
    """Whether every query head has a logit without a value in its softmax (gpt-oss)."""
    attn_softcap: float | None
    final_softcap: float | None
    logit_divisor: float | None
    """What the logits are divided by (Granite); None: 1."""
    tie_embeddings: bool
    max_position: int

    def __post_init__(self) -> None:
        sizes = "vocab_size hidden_size num_layers num_heads num_kv_heads head_dim mlp_dim"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads are not a multiple of {self.num_kv_heads} KV heads"
            )
        if len(self.layer_rope) != self.num_layers or len(self.layer_window) != self.num_layers:
            raise ValueError(f"layer_rope and layer_window must have {self.num_layers} entries")
        if not all(0 <= index < len(self.ropes) for index in self.layer_rope):
            raise ValueError(f"layer_rope {self.layer_rope} exceeds {len(self.ropes)} ropes")
        if any(window is not None and window < 1 for window in self.layer_window):
            raise ValueError(f"sliding windows must be positive, got {self.layer_window}")
        if not self.norm_eps >= 0:
            raise ValueError(f"norm_eps must not be negative, got {self.norm_eps}")
        factors = "embed_scale residual_scale attn_scale attn_softcap final_softcap logit_divisor"
        for name in factors.split():
            factor = getattr(self, name)
            if factor is not None and not factor > 0:
                raise ValueError(f"{name} must be positive, got {factor}")
        # All layers share one table of cosines, so all ropes rotate the same dimensions.
        if len({rope.dim for rope in self.ropes}) != 1 or self.ropes[0].dim > self.head_dim:
            raise ValueError(f"ropes must share one dim of at most head_dim {self.head_dim}")
        if self.activation not in get_args(Activation):
            raise ValueError(f"unknown activation {self.activation!r}")
