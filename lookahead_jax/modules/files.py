"""Files of lookahead modules: safetensors with PEFT names and a JSON description."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.typing import DTypeLike

from lookahead_jax.checkpoints.hf_files import read_json
from lookahead_jax.host.files import atomic_write
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.model.params import Params
from lookahead_jax.modules.definition import TARGETS, LookaheadConfig, LookaheadModules, lora_shapes

CONFIG_FILE = "lookahead_config.json"
TENSOR_FILE = "lookahead_model.safetensors"
FORMAT = 1
_WITH_MEMORY = 2  # a reader that does not know the field `memory` must not read these
_DTYPES = (np.dtype(np.float32), np.dtype(np.float16))
_EMBEDDINGS = "lookahead.embeddings"


def save_modules(
    directory: str | os.PathLike,
    modules: LookaheadModules,
    *,
    params: Params,
    dtype: DTypeLike = np.float32,
) -> None:
    """Writes the modules for the base model `params` into `directory`, which is created if missing.

    `lookahead_model.safetensors` holds tensors of `dtype`, float32 or float16: the LoRA under its
    PEFT names and in PEFT's orientation (lora_A [R, in], lora_B [out, R]), and the tokens as
    `lookahead.embeddings` [M, D]. `lookahead_config.json` holds the sizes, the fingerprint of the
    base model and the digest of the tensors. Each file is replaced atomically, the config last;
    after a crash between the two, loading fails. Raises ValueError for another `dtype`.
    """
    if jnp.dtype(dtype) not in _DTYPES:
        raise ValueError(f"dtype {jnp.dtype(dtype)}: modules are stored as float32 or float16")
    tensors = {_EMBEDDINGS: np.asarray(modules.embeddings, dtype)}
    for name, pair in modules.lora.items():
        for layer in range(pair["a"].shape[0]):
            for part, letter in (("a", "A"), ("b", "B")):
                values = np.asarray(pair[part][layer], dtype)
                tensors[_peft_name(layer, name, letter)] = np.ascontiguousarray(values.T)
    content = safetensors.numpy.save(tensors, {"format": "pt"})
    described = {
        "format": _WITH_MEMORY if modules.config.memory else FORMAT,
        **modules.config.described,
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
    another base model, if a file is damaged or has unexpected content, or if a tensor holds NaN or
    infinite values, as of a training that diverged.
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
        raise ValueError(f"{path / TENSOR_FILE} is damaged: its digest differs from {CONFIG_FILE}")
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
    """The checked content of the folder's config file; `config` has the sizes."""
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
            raise ValueError(f"{path}: {name} is {value!r}, of the wrong type")
    known = _WITH_MEMORY if described.get("memory") else FORMAT
    if described["format"] != known:
        raise ValueError(f"{path}: format {described['format']} is unknown; known: {known}")
    names = [field.name for field in dataclasses.fields(LookaheadConfig)]
    sizes = {name: described[name] for name in names if name in described}
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
        if values.shape != shape or values.dtype not in _DTYPES:
            raise ValueError(f"{path}: {name} is {values.dtype} {values.shape}, not {shape}")
        with np.errstate(over="ignore"):
            values = values.astype(dtype)
        if not np.isfinite(values).all():
            raise ValueError(
                f"{path}: {name} holds values that are NaN, infinite or too large for "
                f"{jnp.dtype(dtype)}; train the modules again, or load them with a wider dtype"
            )
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
