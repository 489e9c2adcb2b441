"""Opens a Hugging Face model directory: config.json, tokenizer, generation_config.json, tensors."""

import math
from pathlib import Path
from typing import Any

from lookahead_jax.checkpoints.expert_tensors import one_per_expert
from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.checkpoints.hf_files import read_json
from lookahead_jax.checkpoints.safetensors_files import safetensors_of
from lookahead_jax.checkpoints.source import CheckpointSource, GenerationDefaults
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.checkpoints.weights import is_optional
from lookahead_jax.model.config import ModelConfig

FOLDER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
"""Patterns of the files that are read beside the weights."""


def open_directory(path: Path) -> CheckpointSource:
    """The checkpoint in a directory; all headers are checked.

    Raises:
      FileNotFoundError: when the directory, config.json or a weight file is missing.
      ValueError: for anything malformed or unsupported, naming the file.
    """
    hf, config = read_config(path)
    return CheckpointSource(
        hf=hf,
        config=config,
        generation=_generation_defaults(path, hf),
        tokenizer=Tokenizer.load(path),
        tensors=one_per_expert(
            safetensors_of(path, lambda name: is_optional(name, config)), config
        ),
    )


def read_config(path: Path) -> tuple[dict[str, Any], ModelConfig]:
    """The content of a directory's config.json, and the configuration it describes.

    Raises:
      FileNotFoundError: when there is no directory, or it has no config.json.
      ValueError: when the file is malformed or describes what is not supported.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory")
    hf = read_json(path, "config.json")
    if hf is None:
        raise FileNotFoundError(f"{path}: has no config.json, so it is not a model directory")
    try:
        return hf, config_from_hf(hf)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _generation_defaults(directory: Path, hf: dict[str, Any]) -> GenerationDefaults:
    # generation_config.json wins over what config.json says, field by field.
    text = hf.get("text_config")
    fields = (text if isinstance(text, dict) else {}) | hf
    fields |= read_json(directory, "generation_config.json") or {}

    def number(name: str, kind: type) -> Any:
        value = fields.get(name)
        if value is None:
            return None
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{directory}: {name} must be of type {kind.__name__}, got {value!r}")
        if not math.isfinite(value) or abs(value) >= 2**31:
            raise ValueError(f"{directory}: {name} is out of range: {value}")
        return value

    eos = fields.get("eos_token_id")
    eos_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(token) is int and 0 <= token < 2**31 for token in eos_ids):
        raise ValueError(f"{directory}: eos_token_id must be token ids, got {eos!r}")
    bos_id, pad_id = number("bos_token_id", int), number("pad_token_id", int)
    return GenerationDefaults(
        eos_ids=tuple(eos_ids),
        bos_id=bos_id,
        pad_id=None if pad_id is None or pad_id < 0 else pad_id,  # old Llamas say -1 for none
        temperature=number("temperature", float),
        top_k=number("top_k", int),
        top_p=number("top_p", float),
    )
