"""What `load` reads from a checkpoint, whichever format it is stored in."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from lookahead_jax.checkpoints.stored_layout import Index
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor's place and type, as the checked header of its file states them."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """Type of the values that are read, as a safetensors code: F32, BF16, ..."""


TensorReader = Callable[[StoredTensor, Index], np.ndarray]
"""Reads the slice of a stored tensor; bounds are explicit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensors:
    """The named tensors of a checkpoint."""

    where: str
    """Names the checkpoint in messages."""
    stored: Mapping[str, StoredTensor]
    """Every tensor by its Hugging Face name."""
    open: Callable[[], AbstractContextManager[TensorReader]]
    """Opens the files for reading."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What the checkpoint's authors suggest for generation; None where they say nothing."""

    eos_ids: tuple[int, ...]
    """Any of these ends a row; empty if the checkpoint names none."""
    bos_id: int | None
    pad_id: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSource:
    """A checkpoint whose headers are read and whose weights are not."""

    hf: Mapping[str, Any]
    """The content of config.json; of a GGUF file, what its metadata amount to."""
    config: ModelConfig
    tokenizer: Tokenizer | None
    generation: GenerationDefaults
    tensors: Tensors
