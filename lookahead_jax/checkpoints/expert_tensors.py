"""Experts that a checkpoint stores together, seen as one tensor per expert.

The parameter table names one tensor per expert, as public Mixtral and Qwen3-MoE checkpoints have.
transformers 5 can write the experts of a layer as one tensor (`save_original_format=False`).
Letters: X experts, D model, F mlp.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from lookahead_jax.checkpoints.source import StoredTensor, TensorReader, Tensors
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.params import Index, parameter_specs, stored_shape

_FUSED = re.compile(
    r"(model\.|)layers\.(\d{1,5})\.mlp\.(?:gate\.weight|experts\.(gate_up|down)_proj)"
)


@dataclasses.dataclass(frozen=True)
class _Part:
    """One expert's matrix inside a tensor [X, rows, columns]."""

    tensor: StoredTensor
    expert: int
    first: int
    """Row at which it begins."""

    def read(self, read: TensorReader, index: Index) -> np.ndarray:
        rows, columns = index
        rows = slice(self.first + rows.start, self.first + rows.stop)
        return read(self.tensor, (slice(self.expert, self.expert + 1), rows, columns))[0]


def one_per_expert(tensors: Tensors, config: ModelConfig) -> Tensors:
    """The same tensors under the names of `parameter_specs`; nothing is read yet.

    Raises:
      ValueError: when a tensor of several experts has another shape than the config calls for, and
        for a tensor that is there twice.
    """
    if config.experts is None:
        return tensors
    stored: dict[str, StoredTensor] = {}
    parts: dict[str, _Part] = {}
    specs = parameter_specs(config)

    def add(name: str, tensor: StoredTensor) -> None:
        if name in stored:
            raise ValueError(f"{tensor.file}: {stored[name].name} and {tensor.name} are the same")
        stored[name] = tensor

    for name, tensor in tensors.stored.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            add(name, tensor)
            continue
        prefix, layer, kind = match[1], int(match[2]), match[3]
        if kind is None:
            add(prefix + _bare(specs["layers.router"].tensor_at((layer,))), tensor)
            continue
        wanted = [("down", 0)] if kind == "down" else [("gate", 0), ("up", config.mlp_dim)]
        shape = stored_shape(specs[f"layers.{wanted[0][0]}"], config)
        expected = (config.experts.count, len(wanted) * shape[0], *shape[1:])
        if tensor.shape != expected:
            raise ValueError(
                f"{tensor.file}: {name} has shape {tensor.shape}, config.json calls for {expected}"
            )
        for expert in range(config.experts.count):
            for path, first in wanted:
                own = prefix + _bare(specs[f"layers.{path}"].tensor_at((layer, expert)))
                add(own, StoredTensor(tensor.file, own, shape, tensor.dtype))
                parts[own] = _Part(tensor, expert, first)

    @contextlib.contextmanager
    def open_files() -> Iterator[TensorReader]:
        with tensors.open() as read:

            def read_part(tensor: StoredTensor, index: Index) -> np.ndarray:
                part = parts.get(tensor.name)
                return read(tensor, index) if part is None else part.read(read, index)

            yield read_part

    return Tensors(where=tensors.where, stored=stored, open=open_files)


def _bare(name: str) -> str:
    return name.removeprefix("model.")
