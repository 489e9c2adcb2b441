"""Lookahead modules: learned tokens after a prompt, and a LoRA that acts on them alone.

Letters: M lookahead tokens, R LoRA rank, L layers, D model, F mlp, N query heads, K KV heads, H.
Sources: LookaheadKV (arXiv 2603.10899); for tokens that stay in the cache, RestoreKV
(arXiv 2608.01247).
"""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from lookahead_jax.host.integers import check_integer
from lookahead_jax.host.warn import warn
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block
from lookahead_jax.model.params import Params
from lookahead_jax.model.quantization import rows_of
from lookahead_jax.policies.base import Policy, WithModules

# Linear layers a LoRA can sit on, as PEFT names them. (In checkpoints of Phi-3 and GLM some are
# fused; their modules keep these names all the same.)
TARGETS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMAL_SCALE = 0.02  # the initializer_range of every supported family


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookaheadConfig:
    """Sizes of the modules. Published: 32 tokens, rank 8, alpha 32, all targets."""

    tokens: int
    """M, the number of lookahead tokens."""
    rank: int
    """R, the rank of every LoRA; 0 trains only the tokens."""
    alpha: float
    """Scales the LoRA update by alpha / rank."""
    targets: tuple[str, ...]
    """The linear layers that have a LoRA, in every decoder layer."""
    init: Literal["table", "normal"]
    """Tokens are drawn with the mean and spread of the embedding table, or from N(0, 0.02^2)."""
    memory: bool = False
    """The tokens' own keys and values stay in the cache, as M entries of every head's budget."""

    def __post_init__(self) -> None:
        check_integer("lookahead tokens", self.tokens, least=1)
        check_integer("LoRA rank", self.rank, least=0)
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"LoRA alpha {self.alpha} must be a positive number")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or len(set(self.targets)) != len(self.targets):
            raise ValueError(
                f"LoRA targets {list(self.targets)}: give each at most once, out of {list(TARGETS)}"
            )
        if bool(self.targets) != bool(self.rank):
            raise ValueError("give a LoRA both a rank above 0 and targets, or neither")
        if self.init not in get_args(LookaheadConfig.__annotations__["init"]):
            raise ValueError(f"unknown init {self.init!r}; known: table, normal")
        if not isinstance(self.memory, bool):
            raise ValueError(f"memory must be True or False, not {self.memory!r}")

    @property
    def staying(self) -> int:
        """Entries per layer and head that the modules leave in the cache: M or 0."""
        return self.tokens if self.memory else 0

    @property
    def described(self) -> dict[str, Any]:
        """The sizes by name; `memory` only where it is set, as before there was such a field."""
        fields = dataclasses.asdict(self)
        return fields if self.memory else {n: v for n, v in fields.items() if n != "memory"}


@struct.dataclass
class LookaheadModules:
    """The trained parameters, a pytree of two fields."""

    embeddings: jax.Array  # [M, D] rows of the residual stream, embedding scale included
    lora: Params  # {"q": {"a": [L, D, R], "b": [L, R, N * H]}, ...} one pair per target
    config: LookaheadConfig = struct.field(pytree_node=False)


def staying_entries(policy: Policy, modules: LookaheadModules | None) -> int:
    """Entries per layer and head that stay of the modules that `policy` reads, 0 if none do."""
    if modules is None or not isinstance(policy.reading, WithModules):
        return 0
    return modules.config.staying


def lora_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Flattened inputs and outputs of each linear layer that a LoRA can sit on.

    Experts take no LoRA: in a model with experts these are the attention's layers.
    """
    d, f = model.hidden_size, model.mlp_dim
    query, key = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = {"q": (d, query), "k": (d, key), "v": (d, key), "o": (query, d)}
    if model.experts is not None:
        return attention
    return attention | {"gate": (d, f), "up": (d, f), "down": (f, d)}


def init_modules(
    key: jax.Array,
    config: LookaheadConfig,
    model: ModelConfig,
    *,
    params: Params | None = None,
) -> LookaheadModules:
    """Float32 modules to start training from.

    Every LoRA starts without effect (b = 0, a uniform within 1 / sqrt(inputs), as in PEFT).
    `init="table"` draws the tokens from a normal distribution with the mean and spread that the
    embedding table of `params` has in each dimension, so that they differ from one another and
    lie where the model expects tokens. Targets that the model lacks (`lora_shapes`) are left out
    with a warning. Raises ValueError if `init="table"` lacks `params`, or if no target is left.
    """
    config = with_targets_of(model, config)
    size = (config.tokens, model.hidden_size)
    normal = jax.random.normal(jax.random.fold_in(key, len(TARGETS)), size, jnp.float32)
    if config.init == "table":
        if params is None:
            raise ValueError('init="table" draws tokens from the embedding table: give params=')
        table = rows_of(params["embed"], slice(None)).astype(jnp.float32)
        table = table * (model.embed_scale or 1.0)
        normal = table.mean(0, keepdims=True) + normal * table.std(0, keepdims=True)
    else:
        normal = normal * _NORMAL_SCALE
    lora = {}
    for i, (name, (inputs, outputs)) in enumerate(lora_shapes(model).items()):
        if name in config.targets:
            shape = (model.num_layers, inputs, config.rank)
            draw = jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -1.0, 1.0)
            b = jnp.zeros((model.num_layers, config.rank, outputs), jnp.float32)
            lora[name] = {"a": draw * inputs**-0.5, "b": b}
    return LookaheadModules(normal, lora, config)


def with_targets_of(model: ModelConfig, config: LookaheadConfig) -> LookaheadConfig:
    """`config` without the LoRA targets that the model lacks."""
    there = tuple(name for name in config.targets if name in lora_shapes(model))
    if there == config.targets:
        return config
    absent = ", ".join(name for name in config.targets if name not in there)
    if not there:
        raise ValueError(
            f"LoRA targets {absent}: the experts of a {model.model_type} model take no LoRA; "
            f"choose out of {', '.join(lora_shapes(model))}"
        )
    warn(f"the experts of a {model.model_type} model take no LoRA: {absent} are left out")
    return dataclasses.replace(config, targets=there)


def observer_block(
    modules: LookaheadModules,
    length: Int[Array, " B"],
    rope_span: Int[Array, " B"],
    *,
    dtype: DTypeLike | None = None,
) -> Block:
    """The lookahead tokens as rows at positions length .. length + M - 1, with their LoRA.

    They see the prompt and one another causally. `length` is that of the prompt, `rope_span` the
    total length its RoPE factors were chosen for. `dtype` is that of the model's weights (default:
    that of the embeddings); it matters for modules in float32 on a bfloat16 model. The LoRA's
    factor b includes the scale.
    """
    m, d = modules.embeddings.shape
    dtype = dtype or modules.embeddings.dtype
    scale = modules.config.alpha / max(modules.config.rank, 1)
    lora = {
        name: {"a": pair["a"].astype(dtype), "b": (pair["b"] * scale).astype(dtype)}
        for name, pair in modules.lora.items()
    }
    x = modules.embeddings.astype(dtype)
    return Block(
        x=jnp.broadcast_to(x[None], (length.shape[0], m, d)),
        positions=length[:, None] + jnp.arange(m, dtype=jnp.int32)[None],
        rope_span=rope_span,
        lora=lora or None,
    )
