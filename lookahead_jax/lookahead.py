"""Lookahead modules: the learned tokens that stand after a prompt, and the LoRA only they feel.

Letters: M lookahead tokens, R LoRA rank, L layers, D model, F mlp, N query heads, K KV heads, H.
Source: LookaheadKV (arXiv 2603.10899).
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from lookahead_jax.config import ModelConfig
from lookahead_jax.files import atomic_write
from lookahead_jax.hf_files import read_json
from lookahead_jax.layers import Params
from lookahead_jax.model import Block
from lookahead_jax.params import fingerprint

CONFIG_FILE = "lookahead_config.json"
TENSOR_FILE = "lookahead_model.safetensors"
FORMAT = 1

# Linear layers a LoRA can sit on, as PEFT names them. (In a Phi-3 checkpoint some are fused; its
# modules keep these names all the same.)
TARGETS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_EMBEDDINGS = "lookahead.embeddings"
_NORMAL_SCALE = 0.02  # the initializer_range of every supported family


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookaheadConfig:
    """Sizes of the modules; hashable. The published choice: 32, 8, 32.0, all targets."""

    tokens: int
    """M, the number of lookahead tokens."""
    rank: int
    """R, the rank of every LoRA; 0 trains the tokens alone."""
    alpha: float
    """The LoRA update is scaled by alpha / rank."""
    targets: tuple[str, ...]
    """The linear layers that have a LoRA, in every decoder layer."""
    init: Literal["table", "normal"]
    """Tokens start with the mean and spread of the embedding table, or from N(0, 0.02^2)."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.rank < 0:
            raise ValueError(f"{self.tokens} lookahead tokens of LoRA rank {self.rank}: too few")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"LoRA alpha {self.alpha} must be a positive number")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or len(set(self.targets)) != len(self.targets):
            raise ValueError(f"LoRA targets {self.targets}: name each once, of {list(TARGETS)}")
        if bool(self.targets) != bool(self.rank):
            raise ValueError("a LoRA needs both a rank above 0 and targets; without it, neither")
        if self.init not in get_args(LookaheadConfig.__annotations__["init"]):
            raise ValueError(f"unknown init {self.init!r}; known: table, normal")


@struct.dataclass
class LookaheadModules:
    """What is trained; everything else stays as it is. A pytree of two fields."""

    embeddings: jax.Array  # [M, D] rows of the residual stream, embedding scale included
    lora: Params  # {"q": {"a": [L, D, R], "b": [L, R, N * H]}, ...} one pair per target
    config: LookaheadConfig = struct.field(pytree_node=False)


def lora_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Flattened inputs and outputs of each linear layer that a LoRA can sit on."""
    d, f = model.hidden_size, model.mlp_dim
    query, key = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "q": (d, query),
        "k": (d, key),
        "v": (d, key),
        "o": (query, d),
        "gate": (d, f),
        "up": (d, f),
        "down": (f, d),
    }


def init_modules(
    key: jax.Array,
    config: LookaheadConfig,
    model: ModelConfig,
    *,
    params: Params | None = None,
) -> LookaheadModules:
    """Float32 modules to start training from.

    Every LoRA starts as no change at all (b = 0, a uniform within 1 / sqrt(inputs), as PEFT
    does). `init="table"` draws the tokens from a normal distribution with the mean and spread
    that the embedding table of `params` has in each dimension: they start where the model expects
    tokens, and differ from one another. Raises ValueError if it lacks `params`.
    """
    size = (config.tokens, model.hidden_size)
    normal = jax.random.normal(jax.random.fold_in(key, len(TARGETS)), size, jnp.float32)
    if config.init == "table":
        if params is None:
            raise ValueError("lookahead tokens drawn from the embedding table need params")
        table = params["embed"].astype(jnp.float32) * (model.embed_scale or 1.0)
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


def observer_block(
    modules: LookaheadModules,
    length: Int[Array, " B"],
    rope_span: Int[Array, " B"],
    *,
    dtype: DTypeLike | None = None,
) -> Block:
    """The lookahead tokens as rows at positions length .. length + M - 1, with their LoRA.

    They see the prompt and one another causally. `length` is that of the prompt, `rope_span` the
    span its rows were opened for. `dtype` is that of the model's weights (default: that of the
    embeddings), which matters where modules are trained in float32 on a bfloat16 model. The LoRA's
    scale is in its factor b.
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


def save_modules(
    directory: str | os.PathLike, modules: LookaheadModules, *, params: Params
) -> None:
    """Writes the modules for the base model `params` into `directory`, made if need be.

    `lookahead_model.safetensors` holds float32 tensors, the LoRA under its PEFT names and in
    PEFT's orientation (lora_A [R, in], lora_B [out, R]), the tokens as `lookahead.embeddings`
    [M, D]; `lookahead_config.json` the sizes, the fingerprint of the base model and the digest
    of the tensors. Each file is replaced whole, the config last: what a crash leaves between the
    two does not load.
    """
    tensors = {_EMBEDDINGS: np.asarray(modules.embeddings, np.float32)}
    for name, pair in modules.lora.items():
        for layer in range(pair["a"].shape[0]):
            for part, letter in (("a", "A"), ("b", "B")):
                values = np.asarray(pair[part][layer], np.float32)
                tensors[_peft_name(layer, name, letter)] = np.ascontiguousarray(values.T)
    content = safetensors.numpy.save(tensors, {"format": "pt"})
    described = {
        "format": FORMAT,
        **dataclasses.asdict(modules.config),
        "base_fingerprint": fingerprint(params),
        "base_fingerprint_float16": fingerprint(params, through=np.float16),
        "tensors_sha256": hashlib.sha256(content).hexdigest(),
        "version": _version(),
    }
    Path(directory).mkdir(parents=True, exist_ok=True)
    atomic_write(Path(directory) / TENSOR_FILE, content)
    atomic_write(Path(directory) / CONFIG_FILE, json.dumps(described, indent=2) + "\n")


def load_modules(
    directory: str | os.PathLike,
    *,
    params: Params,
    config: ModelConfig,
    dtype: DTypeLike | None = None,
) -> LookaheadModules:
    """The modules in `directory`, for the base model `params`, in `dtype` (default: the model's).

    Raises FileNotFoundError if a file is missing, and ValueError if the modules were trained for
    another base model, or if a file is damaged or does not say what it should.
    """
    path = Path(directory)
    described = _read_config(path)
    half = _dtype(params) == jnp.float16
    base = str(described["base_fingerprint_float16" if half else "base_fingerprint"])
    if base != fingerprint(params):
        raise ValueError(
            f"{path}: these lookahead modules were trained for another base model "
            f"({base[:12]}, this one is {fingerprint(params)[:12]})"
        )
    modules_config = described["config"]
    content = (path / TENSOR_FILE).read_bytes()
    if hashlib.sha256(content).hexdigest() != described["tensors_sha256"]:
        raise ValueError(f"{path / TENSOR_FILE} is damaged: it is not what {CONFIG_FILE} describes")
    try:
        tensors = safetensors.numpy.load(content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path / TENSOR_FILE} is not a safetensors file: {error}") from error
    return _assemble(path / TENSOR_FILE, tensors, modules_config, config, dtype or _dtype(params))


def _peft_name(layer: int, target: str, letter: str) -> str:
    return f"base_model.model.model.layers.{layer}.{TARGETS[target]}.lora_{letter}.weight"


def _dtype(params: Params) -> DTypeLike:
    return params["embed"].dtype


def _version() -> str:
    try:
        return importlib.metadata.version("lookahead-jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _read_config(path: Path) -> dict[str, Any]:
    """The checked content of the folder's config file, with the sizes as `config`."""
    described = read_json(path, CONFIG_FILE)
    if described is None:
        raise FileNotFoundError(f"{path}: has no {CONFIG_FILE}, so it holds no lookahead modules")
    path = path / CONFIG_FILE
    kinds = {
        "format": int, "tokens": int, "rank": int, "alpha": (int, float), "targets": list,
        "init": str, "base_fingerprint": str, "base_fingerprint_float16": str,
        "tensors_sha256": str,
    }  # fmt: skip
    for name, kind in kinds.items():
        value = described.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{path}: {name} is {value!r}")
    if described["format"] != FORMAT:
        raise ValueError(f"{path}: format {described['format']} is not known, only {FORMAT}")
    sizes = {field.name: described[field.name] for field in dataclasses.fields(LookaheadConfig)}
    try:
        targets = tuple(str(name) for name in sizes.pop("targets"))
        return described | {"config": LookaheadConfig(targets=targets, **sizes)}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _assemble(
    path: Path,
    tensors: dict[str, np.ndarray],
    config: LookaheadConfig,
    model: ModelConfig,
    dtype: DTypeLike,
) -> LookaheadModules:
    """Tensors of a file -> modules; every name, shape and type must be the expected one."""

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = tensors.pop(name, None)
        if values is None:
            raise ValueError(f"{path} lacks {name}")
        if values.shape != shape or values.dtype != np.float32:
            raise ValueError(f"{path}: {name} is {values.dtype} {values.shape}, not {shape}")
        return values

    lora = {}
    embeddings = take(_EMBEDDINGS, (config.tokens, model.hidden_size))
    for name, (inputs, outputs) in lora_shapes(model).items():
        if name in config.targets:
            layers = range(model.num_layers)
            a = [take(_peft_name(i, name, "A"), (config.rank, inputs)).T for i in layers]
            b = [take(_peft_name(i, name, "B"), (outputs, config.rank)).T for i in layers]
            lora[name] = {
                "a": jnp.asarray(np.stack(a), dtype),
                "b": jnp.asarray(np.stack(b), dtype),
            }
    if tensors:
        raise ValueError(f"{path} holds unexpected tensors: {', '.join(sorted(tensors)[:4])}")
    return LookaheadModules(jnp.asarray(embeddings, dtype), lora, config)
