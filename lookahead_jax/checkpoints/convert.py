"""Writes any checkpoint that `load` reads as a Hugging Face folder of safetensors."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tqdm import tqdm

from lookahead_jax.checkpoints.expert_tensors import as_published
from lookahead_jax.checkpoints.hf_directory import FOLDER_FILES
from lookahead_jax.checkpoints.hf_files import files_of_folder, find, is_plain_name
from lookahead_jax.checkpoints.load import locate, open_checkpoint
from lookahead_jax.checkpoints.safetensors_files import INDEX, SINGLE
from lookahead_jax.checkpoints.source import CheckpointSource, GenerationDefaults
from lookahead_jax.checkpoints.stored_layout import to_checkpoint
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.checkpoints.weights import LoadedWeights, load_weights
from lookahead_jax.host.activity import activity
from lookahead_jax.host.files import atomic_path
from lookahead_jax.host.warn import warn
from lookahead_jax.model.config import ModelConfig

SHARD_BYTES = 5 * 10**9  # as transformers splits checkpoints
_GENERATION, _TEMPLATES = "generation_config.json", "additional_chat_templates"


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the folder `out`, which appears when it is complete.

    Loading it gives the weights of `load(source, dtype=dtype)` bit for bit, the same
    token ids and the same chats. A folder's tokenizer and generation settings are copied; those of
    a GGUF file are written. Host memory: twice the weights, and one shard.

    Args:
      source: a model, named as for `load`.
      out: a folder that does not exist yet, or is empty.
      dtype: of the weights; None keeps the checkpoint's own (float32 for quantised GGUF files).
      shard_bytes: weights of more bytes are split into several files with an index.

    Raises:
      FileExistsError: when `out` holds something.
      OSError, ValueError: as `load`, and when the folder cannot be written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already: name a new folder")
    with atomic_path(out) as folder:
        path = locate(source)
        checkpoint = open_checkpoint(path)
        with activity(f"loading {source}"):
            weights = load_weights(checkpoint.tensors, checkpoint.config, dtype=dtype)
        for notice in weights.notices:
            warn(notice)
        folder.mkdir()
        _write_json(folder / "config.json", _config_json(checkpoint.hf, weights))
        if path.is_dir():
            _copy_files(path, folder)
        elif checkpoint.tokenizer is not None:
            _write_tokenizer(folder, checkpoint.tokenizer, checkpoint.config)
        if not (folder / _GENERATION).exists():
            _write_generation(folder, checkpoint)
        tensors, config = to_checkpoint(weights.params, weights.config), weights.config
        del weights  # what follows needs the memory
        tensors = as_published(tensors, config)
        try:
            _write_weights(folder, tensors, shard_bytes)
        except SafetensorError as error:
            raise OSError(f"{out}: the weights cannot be written ({error})") from error


def _config_json(hf: Mapping[str, Any], weights: LoadedWeights) -> dict[str, Any]:
    """The source's config.json, for weights that are not quantised, nor part of a larger model."""
    config = weights.config
    fields = dict(hf)
    if isinstance(text := hf.get("text_config"), Mapping):
        fields = {**text, "model_type": config.model_type}
    for name in ("quantization_config", "torch_dtype"):
        fields.pop(name, None)
    dtype = weights.params["embed"].dtype.name
    return fields | {"dtype": dtype, "tie_word_embeddings": config.tie_embeddings}


def _copy_files(source: Path, folder: Path) -> None:
    """Copies what belongs to a model folder besides its configuration and weights."""
    for pattern in FOLDER_FILES[1:]:
        if "*" not in pattern:
            if (file := find(source, pattern)) is not None:
                (folder / pattern).write_bytes(file.read_bytes())
            continue
        inner, suffix = pattern.split("/*")
        for file in files_of_folder(source, inner, suffix=suffix):
            (folder / inner).mkdir(exist_ok=True)
            (folder / inner / file.name).write_bytes(file.read_bytes())


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position,
    }
    _write_json(folder / "tokenizer_config.json", settings | dict(tokenizer.special_tokens))
    for name, template in tokenizer.chat_templates.items():
        file = folder / "chat_template.jinja"
        if name != "default":
            if not is_plain_name(name):
                raise ValueError(f"the chat template {name!r} cannot be the name of a file")
            file = folder / _TEMPLATES / f"{name}.jinja"
            file.parent.mkdir(exist_ok=True)
        file.write_text(template, encoding="utf-8")


def _write_generation(folder: Path, checkpoint: CheckpointSource) -> None:
    given: GenerationDefaults = checkpoint.generation
    fields = {
        "bos_token_id": given.bos_id,
        "eos_token_id": list(given.eos_ids) or None,
        "pad_token_id": given.pad_id,
        "temperature": given.temperature,
        "top_k": given.top_k,
        "top_p": given.top_p,
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    if fields:
        _write_json(folder / _GENERATION, fields)


def _write_weights(folder: Path, tensors: dict[str, np.ndarray], shard_bytes: int) -> None:
    """Writes the tensors, and takes them out of the dict so that their memory is freed."""
    shards = list(_shards(tensors, shard_bytes))
    total = sum(tensor.nbytes for tensor in tensors.values())
    file_of: dict[str, str] = {}
    with tqdm(desc="weights", total=total, unit="B", unit_scale=True, disable=None) as bar:
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = SINGLE if len(shards) == 1 else file
            shard = {name: tensors.pop(name) for name in names}
            save_file(shard, folder / file, metadata={"format": "pt"})
            (folder / file).chmod((folder / "config.json").stat().st_mode)  # it was made private
            file_of |= dict.fromkeys(names, file)
            bar.update(sum(tensor.nbytes for tensor in shard.values()))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        _write_json(folder / INDEX, index)


def _shards(tensors: Mapping[str, np.ndarray], limit: int) -> Iterator[list[str]]:
    """Names of the tensors of each shard: as many as fit the limit, at least one."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
