"""Experts that a checkpoint stores together, seen as one tensor per expert.

The parameter table names one tensor per expert, as public Mixtral and Qwen3-MoE checkpoints have.
transformers 5 can write the experts of a layer as one tensor (`save_original_format=False`), and
gpt-oss has no other format: matrices transposed, gate and up alternating, in bfloat16 or MXFP4
(blocks of 32 values of 4 bits with a common power of two; OCP Microscaling Formats 1.0).
Letters: X experts, D model, F mlp.
"""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterator

import numpy as np

from lookahead_jax.checkpoints.source import StoredTensor, TensorReader, Tensors
from lookahead_jax.checkpoints.stored_layout import Index, stored_shape
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.parameter_specs import axis_sizes, parameter_specs

_FUSED = re.compile(
    r"(model\.|)layers\.(\d{1,5})\.mlp\."
    r"(?:gate\.weight|experts\.(gate_up|down)_proj(_bias|_blocks|_scales|))"
)
_BLOCK = 32  # values that share a scale
_FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """One expert's matrix or bias inside a tensor whose first axis is the expert."""

    tensor: StoredTensor
    scales: StoredTensor | None
    """The scales of MXFP4 blocks [X, rows, columns / 32, 16]; None for plain values."""
    expert: int
    first: int
    """Its first row."""
    step: int
    """From one of its rows to the next."""
    transposed: bool

    def read(self, read: TensorReader, index: Index) -> np.ndarray:
        """The slice [rows(, columns)]."""
        one = slice(self.expert, self.expert + 1)
        first = self.first + self.step * index[0].start
        rows = slice(first, first + self.step * (index[0].stop - index[0].start - 1) + 1)
        if self.scales is not None:
            start, stop = index[1].start // _BLOCK, -(-index[1].stop // _BLOCK)
            at = (one, rows, slice(start, stop))
            blocks = read(self.tensor, (*at, slice(0, _BLOCK // 2)))[0, :: self.step]
            values = _dequantised(blocks, read(self.scales, at)[0, :: self.step])
            return values[:, index[1].start - start * _BLOCK : index[1].stop - start * _BLOCK]
        if self.transposed:
            return read(self.tensor, (one, index[1], rows))[0, :, :: self.step].T
        return read(self.tensor, (one, rows, *index[1:]))[0, :: self.step]


def _dequantised(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 blocks [rows, groups, 16] and scales [rows, groups], uint8 -> float32 [rows, cols].

    The lower half of a byte comes first. The scales are powers of two, biased by 127.
    """
    values = np.stack([_FP4[blocks & 15], _FP4[blocks >> 4]], axis=-1)
    values = values.reshape(*blocks.shape[:2], _BLOCK)
    return np.ldexp(values, scales[..., None].astype(np.int32) - 127).reshape(len(blocks), -1)


def one_per_expert(tensors: Tensors, config: ModelConfig) -> Tensors:
    """The same tensors under the names of `parameter_specs`; nothing is read yet.

    Raises:
      ValueError: when a tensor of several experts has another shape or type than the config calls
        for, when blocks lack their scales, and for a tensor that is there twice.
    """
    if config.experts is None:
        return tensors
    stored: dict[str, StoredTensor] = {}
    parts: dict[str, _Part] = {}

    def add(name: str, tensor: StoredTensor) -> None:
        if name in stored:
            raise ValueError(f"{tensor.file}: {stored[name].name} and {tensor.name} are the same")
        stored[name] = tensor

    for name, tensor in tensors.stored.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            add(name, tensor)
        elif match[3] is None:
            router = parameter_specs(config)["layers.router"].tensor_at((int(match[2]),))
            add(match[1] + router.removeprefix("model."), tensor)
        elif match[4] != "_scales":
            for own, shape, part in _parts(tensor, match, tensors, config):
                dtype = tensor.dtype if part.scales is None else _float_dtype(tensors)
                add(own, StoredTensor(tensor.file, own, shape, dtype))
                parts[own] = part

    @contextlib.contextmanager
    def open_files() -> Iterator[TensorReader]:
        with tensors.open() as read:

            def read_part(tensor: StoredTensor, index: Index) -> np.ndarray:
                part = parts.get(tensor.name)
                return read(tensor, index) if part is None else part.read(read, index)

            yield read_part

    return Tensors(where=tensors.where, stored=stored, open=open_files)


def _parts(
    tensor: StoredTensor, match: re.Match[str], tensors: Tensors, config: ModelConfig
) -> Iterator[tuple[str, tuple[int, ...], _Part]]:
    """Name, shape and place of every expert's matrix in a tensor of all of them."""
    prefix, layer, kind, suffix = match[1], int(match[2]), match[3], match[4]
    names = ("down",) if kind == "down" else ("gate", "up")
    alternating = config.model_type == "gpt_oss"
    paths = [f"layers.{name}_bias" if suffix == "_bias" else f"layers.{name}" for name in names]
    specs = parameter_specs(config)
    if paths[0] not in specs:
        raise ValueError(f"{tensor.file}: {tensor.name} is not part of {config.model_type} models")
    own = stored_shape(specs[paths[0]], config)
    count = axis_sizes(config)["expert"]
    whole = (count, len(names) * own[0], *own[1:])
    scales, transposed = None, alternating and suffix == ""
    if suffix == "_blocks":
        where = tensor.name.removesuffix("blocks") + "scales"
        scales = tensors.stored.get(where)
        if scales is None:
            raise ValueError(f"{tensor.file}: {tensor.name} is there without {where}")
        groups = (*whole[:2], -(-whole[2] // _BLOCK))
        _expect(scales, groups, "U8")
        _expect(tensor, (*groups, _BLOCK // 2), "U8")
    else:
        _expect(tensor, (whole[0], *whole[:0:-1]) if transposed else whole, tensor.dtype)
    for expert in range(count):
        for place, path in enumerate(paths):
            name = prefix + specs[path].tensor_at((layer, expert)).removeprefix("model.")
            first, step = (place, len(names)) if alternating else (place * own[0], 1)
            yield name, own, _Part(
                tensor=tensor, scales=scales, expert=expert, first=first, step=step,
                transposed=transposed,
            )  # fmt: skip


def _expect(tensor: StoredTensor, shape: tuple[int, ...], dtype: str) -> None:
    if (tensor.shape, tensor.dtype) != (shape, dtype):
        raise ValueError(
            f"{tensor.file}: {tensor.name} has shape {tensor.shape} and type {tensor.dtype}, "
            f"config.json calls for {shape} and {dtype}"
        )


def _float_dtype(tensors: Tensors) -> str:
    """The type of the weights that are not quantised."""
    types = (t.dtype for n, t in tensors.stored.items() if n.endswith("embed_tokens.weight"))
    return next(types, "BF16")


def as_published(tensors: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Tensors named by `parameter_specs` -> those of the family's public checkpoints, unquantised.

    They differ in gpt-oss only. There, the experts move out of `tensors`, which saves their memory.
    """
    if config.model_type != "gpt_oss":
        return tensors
    specs = parameter_specs(config)
    sizes = axis_sizes(config)

    def of_layer(path: str, layer: int) -> np.ndarray:
        names = [specs[path].tensor_at((layer, expert)) for expert in range(sizes["expert"])]
        return np.stack([tensors.pop(name) for name in names])

    kinds = [(kind, names) for kind, *names in (("gate_up", "gate", "up"), ("down", "down"))]
    for layer, (kind, names), suffix in itertools.product(
        range(sizes["layer"]), kinds, ("", "_bias")
    ):
        parts = [of_layer(f"layers.{name}{suffix}", layer) for name in names]
        whole = np.stack(parts, axis=2).reshape(len(parts[0]), -1, *parts[0].shape[2:])
        whole = whole if suffix else whole.swapaxes(1, 2)
        name = f"model.layers.{layer}.mlp.experts.{kind}_proj{suffix}"
        tensors[name] = np.ascontiguousarray(whole)
    return tensors
