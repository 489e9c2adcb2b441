"""Reads the header of a GGUF file: metadata and the place of every tensor.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Counts, lengths and offsets of a
file are never trusted: each is compared with the bytes that the file has left before it is used.
"""

import dataclasses
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MIN_ENTRY = 12  # bytes of a metadata entry: the length of its name and its type
_MIN_TENSOR = 24  # bytes of a tensor's entry without its name
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "|b1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}

# struct's letters differ from NumPy's; struct reads single numbers ten times as fast.
_LETTERS = {"u1": "B", "i1": "b", "u2": "H", "i2": "h", "u4": "I", "i4": "i", "f4": "f", "b1": "?"}
_LETTERS |= {"u8": "Q", "i8": "q", "f8": "d"}
_STRUCTS = {dtype: struct.Struct("<" + _LETTERS[dtype[1:]]) for dtype in _SCALARS.values()}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where a tensor is in its file, and how its values are encoded."""

    name: str
    shape: tuple[int, ...]
    """As in a Hugging Face checkpoint: [out, in] of a matrix."""
    kind: GGMLQuantizationType
    start: int
    """First byte in the file."""
    row_bytes: int
    """Bytes of one row along the last dimension."""

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return self.row_bytes * int(np.prod(self.shape[:-1], dtype=np.int64))


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """The checked header of a file."""

    path: Path
    metadata: dict[str, Any]
    """Scalars as Python values, arrays of numbers as NumPy arrays, arrays of texts as lists."""
    tensors: dict[str, GgufTensor]


def read_header(path: Path) -> GgufHeader:
    """The header of the file `path`.

    Raises:
      ValueError: when the file is no GGUF file, is truncated, or states what cannot be true.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(path, data).header()
    except (ValueError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"{path}: not a complete GGUF file ({error}); download it again") from None


class _Cursor:
    """Reads values one after the other and never past the end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self._path, self._data, self._at = path, data, 0

    def header(self) -> GgufHeader:
        if self._take(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("<u4")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} is not one of {_VERSIONS}")
        tensors, entries = self._count(_MIN_TENSOR), self._count(_MIN_ENTRY)
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            name = self._text()
            if name in metadata:
                raise ValueError(f"metadata {name!r} occurs twice")
            metadata[name] = self._value(self._kind())
        places = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            raise ValueError(f"general.alignment is {alignment!r}")
        base = -(-self._at // alignment) * alignment
        return GgufHeader(self._path, metadata, self._placed(places, base))

    def _placed(self, tensors: list[GgufTensor], base: int) -> dict[str, GgufTensor]:
        """Tensors with their place in the file, none of them past its end or on another."""
        placed: dict[str, GgufTensor] = {}
        end = base
        for tensor in sorted(tensors, key=lambda tensor: tensor.start):
            start = base + tensor.start
            if tensor.name in placed:
                raise ValueError(f"tensor {tensor.name!r} occurs twice")
            if start < end or start + tensor.size > len(self._data):
                raise ValueError(f"tensor {tensor.name!r} overlaps another or ends past the file")
            placed[tensor.name] = dataclasses.replace(tensor, start=start)
            end = start + tensor.size
        return placed

    def _tensor(self) -> GgufTensor:
        name = self._text()
        dimensions = self._number("<u4")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._number("<u8") for _ in range(dimensions))[::-1]
        number, start = self._number("<u4"), self._number("<u8")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"tensor {name!r} has the unknown type {number}") from None
        block, size = GGML_QUANT_SIZES[kind]
        values = 1
        for n in shape:
            values *= n
        if not values or values > len(self._data) * block or shape[-1] % block:
            raise ValueError(f"tensor {name!r} of type {kind.name} has the shape {list(shape)}")
        return GgufTensor(name, shape, kind, start, shape[-1] // block * size)

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._text()
        if kind != GGUFValueType.ARRAY:
            return self._number(_SCALARS[kind])
        inner = self._kind()
        if inner == GGUFValueType.ARRAY:
            raise ValueError("arrays of arrays are not supported")
        if inner == GGUFValueType.STRING:
            return [self._text() for _ in range(self._count(8))]
        dtype = np.dtype(_SCALARS[inner])
        count = self._count(dtype.itemsize)
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _kind(self) -> GGUFValueType:
        return GGUFValueType(self._number("<u4"))

    def _text(self) -> str:
        return self._take(self._count(1)).decode("utf-8")

    def _count(self, least: int) -> int:
        """A number of items of at least `least` bytes each."""
        count = self._number("<u8")
        left = len(self._data) - self._at
        if count * least > left:
            raise ValueError(f"{count} items cannot fit in the {left} bytes that are left")
        return count

    def _number(self, dtype: str) -> Any:
        number = _STRUCTS[dtype]
        return number.unpack(self._take(number.size))[0]

    def _take(self, count: int) -> bytes:
        if self._at + count > len(self._data):
            raise ValueError("it ends too early")
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken
