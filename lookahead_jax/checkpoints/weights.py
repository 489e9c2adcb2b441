"""The named tensors of a checkpoint -> parameters; only the slices that are needed are read."""

import dataclasses
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from lookahead_jax.checkpoints.hf_files import listing
from lookahead_jax.checkpoints.source import StoredTensor, TensorReader, Tensors
from lookahead_jax.checkpoints.stored_layout import from_stored, stored_index, stored_shape
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.fingerprint import sample_of
from lookahead_jax.model.parameter_specs import ParameterSpec, parameter_specs, shape
from lookahead_jax.model.params import Params, tree, weight_type
from lookahead_jax.model.quantization import QuantizedWeight, quantize
from lookahead_jax.model.sharding import param_shardings

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# Per type: an unsigned integer of its width, and the exponent bits, all set in NaN and infinity.
_EXPONENTS = {
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
}
_IN_CACHE = 2**17  # values that are checked together; more would go through memory twice
_THREADS = 4  # more only wait for memory
_AT_ONCE = 2**22  # values that are read together to compare two tensors
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Names that say "language model" in multimodal Gemma 3, of transformers 4 and 5.
_TEXT_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
_ROTARY_BUFFER = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # recomputed from the config


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedWeights:
    """Parameters, and what was noticed while they were read."""

    params: Params
    config: ModelConfig
    """The given one, but with `tie_embeddings` as the tensors have it."""
    notices: tuple[str, ...]
    """Warnings for the user."""


def is_optional(name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint may have or lack the tensor: it is ignored, or a copy of another."""
    return _is_ignored(name, config) or (
        config.tie_embeddings and _canonical(name, bare=False) in (_HEAD, _EMBEDDING)
    )


def load_weights(
    tensors: Tensors,
    config: ModelConfig,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    weights: str | None = None,
) -> LoadedWeights:
    """Reads a checkpoint's weights; each process reads only the slices its devices hold.

    With `weights="int8"` matrices become `QuantizedWeight`, one layer at a time. Every process then
    reads them whole, because a scale belongs to a whole output channel.

    All names, shapes and dtypes are checked before anything is allocated. Rotary buffers, the
    vision part of Gemma 3 and the second copy of a tied head are ignored; nothing else is.

    Raises:
      ValueError: when tensors and config do not fit together, or a type is not supported.
    """
    kind = weight_type(weights, config)
    stored = _by_canonical_name(tensors, config)
    notices: list[str] = []
    with tensors.open() as read:
        if config.tie_embeddings and _HEAD in stored:
            config, notice = _resolve_tied_head(stored, config, read)
            notices += notice
        _check(tensors.where, stored, config)
        dtype = _own_dtype(stored) if dtype is None else _float_dtype(dtype)
        loader = _Loader(stored, config, dtype, read)
        if mesh is None:
            one: Any = SingleDeviceSharding(jax.local_devices()[0])
            quantized = QuantizedWeight(one, one, one)
            specs = parameter_specs(config).items()
            shardings = tree({p: quantized if s.quantized(kind) else one for p, s in specs})
        else:
            shardings = param_shardings(config, mesh, kind)
        paths = tree({path: path for path in parameter_specs(config)})
        params = jax.tree.map(loader.parameter, paths, shardings)
    if loader.not_finite:
        names = listing(sorted(loader.not_finite))
        notices.append(f"{tensors.where}: NaN or infinite values in the weights: {names}")
    return LoadedWeights(params=params, config=config, notices=tuple(notices))


def _float_dtype(dtype: DTypeLike) -> np.dtype:
    """The checked option `dtype`; ValueError for a type that parameters cannot have."""
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found not in _EXPONENTS:
        raise ValueError(
            f"dtype={dtype!r}: parameters are float32, bfloat16 or float16; for matrices in eight "
            'bits give weights="int8"'
        )
    return found


def _by_canonical_name(tensors: Tensors, config: ModelConfig) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for name, tensor in tensors.stored.items():
        if _is_ignored(name, config):
            continue
        canonical = _canonical(name, bare="embed_tokens.weight" in tensors.stored)
        if canonical in stored:
            other = stored[canonical].name
            raise ValueError(f"{tensors.where}: {name} and {other} are the same tensor")
        stored[canonical] = tensor
    return stored


def _is_ignored(name: str, config: ModelConfig) -> bool:
    if _ROTARY_BUFFER.search(name):
        return True
    return config.model_type == "gemma3_text" and _VISION.match(name) is not None


def _canonical(name: str, *, bare: bool) -> str:
    for prefix, replacement in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    # Saved without its head, a model's tensors have no "model." in front.
    return f"model.{name}" if bare and name != _HEAD else name


def _resolve_tied_head(
    stored: dict[str, StoredTensor], config: ModelConfig, read: TensorReader
) -> tuple[ModelConfig, list[str]]:
    """Drops a tied head's second copy from `stored`; a head that is no copy unties the config.

    transformers 5 does the same. A head without an embedding serves as both.
    """
    head = stored[_HEAD]
    if _EMBEDDING not in stored:
        stored[_EMBEDDING] = stored.pop(_HEAD)
        return config, []
    if _are_equal(head, stored[_EMBEDDING], read):
        del stored[_HEAD]
        return config, []
    notice = (
        f"{head.file}: config.json ties {head.name} to {stored[_EMBEDDING].name}, but their values "
        "differ; both are used. Set tie_word_embeddings to false in config.json to say so"
    )
    return dataclasses.replace(config, tie_embeddings=False), [notice]


def _are_equal(one: StoredTensor, other: StoredTensor, read: TensorReader) -> bool:
    """Whether two matrices hold the same values; NaN equals NaN."""
    known = one.dtype in _DTYPES and other.dtype in _DTYPES
    if one.shape != other.shape or len(one.shape) != 2 or not known:
        return False
    rows, columns = one.shape
    step = max(1, _AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        index = (slice(start, min(start + step, rows)), slice(0, columns))
        a, b = (read(tensor, index).astype(np.float32) for tensor in (one, other))
        if not np.array_equal(a, b, equal_nan=True):
            return False
    return True


def _check(where: str, stored: dict[str, StoredTensor], config: ModelConfig) -> None:
    """Raises ValueError unless names, shapes and types are those that the config calls for."""
    expected = {
        spec.tensor_at(place): stored_shape(spec, config)
        for spec in parameter_specs(config).values()
        for place in np.ndindex(shape(spec.lead, config))
    }
    for problem, names in (
        ("lacks tensors that config.json calls for", expected.keys() - stored.keys()),
        ("has tensors that config.json does not call for", stored.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(
                f"{where}: the checkpoint {problem}: {listing(sorted(names))}; "
                "config.json and weights must belong together"
            )
    for name, tensor in stored.items():
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{tensor.file}: {tensor.name} has shape {tensor.shape}, config.json calls for "
                f"{expected[name]}"
            )
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}; convert it to one of "
                f"{', '.join(_DTYPES)}"
            )


def _own_dtype(stored: dict[str, StoredTensor]) -> np.dtype:
    names = {tensor.dtype: tensor for tensor in stored.values()}
    if len(names) > 1:
        examples = ", ".join(f"{t.name} as {dtype}" for dtype, t in sorted(names.items()))
        raise ValueError(f"the checkpoint mixes dtypes ({examples}); choose one with dtype=")
    return np.dtype(_DTYPES[next(iter(names))])


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Reads parameters; remembers which tensors hold values that are not finite."""

    stored: dict[str, StoredTensor]
    config: ModelConfig
    dtype: np.dtype
    read: TensorReader
    not_finite: set[str] = dataclasses.field(default_factory=set)

    def parameter(self, path: str, sharding: Any) -> jax.Array | QuantizedWeight:
        """A parameter; `sharding` is one, or a `QuantizedWeight` of them."""
        if isinstance(sharding, QuantizedWeight):
            return self._quantized(path, sharding)
        spec = parameter_specs(self.config)[path]
        sizes = shape(spec.axes, self.config)
        blocks: dict[tuple, np.ndarray] = {}  # devices that hold the same block share a read

        def block(index: Any) -> np.ndarray:
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index, sizes, strict=True))
            if bounds not in blocks:
                blocks[bounds] = self._block(spec, tuple(slice(*bound) for bound in bounds))
            return blocks[bounds]

        return jax.make_array_from_callback(sizes, sharding, block)

    def _quantized(self, path: str, shardings: QuantizedWeight) -> QuantizedWeight:
        """A matrix in int8; in floats there is one layer of it at a time."""
        spec = parameter_specs(self.config)[path]
        sizes = shape(spec.axes, self.config)
        inner = tuple(slice(0, n) for n in (sizes[1:] if spec.stacked else sizes))
        axes = spec.axes[1:] if spec.stacked else spec.axes
        inputs = tuple(axes.index(axis) for axis in spec.columns)
        parts = []
        for layer in range(sizes[0] if spec.stacked else 1):
            at = (slice(layer, layer + 1), *inner) if spec.stacked else inner
            matrix = self._block(spec, at)
            matrix = matrix[0] if spec.stacked else matrix
            parts.append((*quantize(matrix, inputs), sample_of(matrix)))
        arrays = [np.stack(part) if spec.stacked else part[0] for part in zip(*parts, strict=True)]

        def place(array: np.ndarray, sharding: Any) -> jax.Array:
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        places = (shardings.values, shardings.scale, shardings.sample)
        return QuantizedWeight(*map(place, arrays, places))

    def _block(self, spec: ParameterSpec, index: tuple[slice, ...]) -> np.ndarray:
        """The values of one parameter at `index`, gathered from its tensors."""
        sizes = tuple(s.stop - s.start for s in index)
        lead, inner = index[: len(spec.lead)], index[len(spec.lead) :]
        out = _empty(sizes, self.dtype)
        for place in np.ndindex(sizes[: len(lead)]):
            at = tuple(s.start + i for s, i in zip(lead, place, strict=True))
            self._fill(out[place], spec, self.stored[spec.tensor_at(at)], inner)
        return out

    def _fill(
        self, out: np.ndarray, spec: ParameterSpec, tensor: StoredTensor, index: tuple[slice, ...]
    ) -> None:
        """Writes the values of one tensor at `index` to `out`.

        Piece by piece, each of which stays in a processor's cache while it is dequantised,
        transposed and checked, and several at a time.
        """
        axis = spec.axes[-len(index) :].index(spec.rows[0])  # the tensor's outermost
        first, last = index[axis].start, index[axis].stop
        step = max(1, _IN_CACHE * (last - first) // out.size)

        def piece(start: int) -> None:
            stop = min(start + step, last)
            part = (*index[:axis], slice(start, stop), *index[axis + 1 :])
            target = out[(slice(None),) * axis + (slice(start - first, stop - first),)]
            block = self.read(tensor, stored_index(spec, self.config, part))
            with np.errstate(over="ignore"):  # reported below, with names
                target[...] = from_stored(spec, self.config, block, part)
            if not _is_finite(block):
                self.not_finite.add(tensor.name)
            elif self.dtype == np.float16 and not _is_finite(target):
                raise ValueError(
                    f"{tensor.file}: {tensor.name} does not fit float16; load it as bfloat16 or "
                    "float32"
                )

        starts = range(first, last, step)
        if len(starts) == 1:
            return piece(first)
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(piece, starts))


def _empty(sizes: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that begins at a multiple of 64 bytes: on CPU, JAX then needs no copy of it."""
    size = math.prod(sizes) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(sizes)


def _is_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite, by their bits: much faster than reading them."""
    integer, exponent = _EXPONENTS[values.dtype]
    bits = np.ascontiguousarray(values).reshape(-1).view(integer)
    chunks = (bits[start : start + _IN_CACHE] for start in range(0, bits.size, _IN_CACHE))
    return all((chunk & integer(exponent)).max() < exponent for chunk in chunks)
