"""The tensors of a GGUF file under their Hugging Face names, dequantised while they are read."""

import contextlib
import dataclasses
import mmap
import re
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from lookahead_jax.checkpoints.gguf_header import GgufHeader, GgufTensor
from lookahead_jax.checkpoints.source import Index, StoredTensor, TensorReader, Tensors
from lookahead_jax.model.config import ModelConfig

# Types that are read; the rest (IQ and ternary types) are refused by name.
KINDS = frozenset(
    GGMLQuantizationType[name]
    for name in [
        "F32",
        "F16",
        "BF16",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
    ]
)
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_HALVES = {GGMLQuantizationType.F16: "F16", GGMLQuantizationType.BF16: "BF16"}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Norms of architectures with one norm before each part, and of those with one after it too.
_NORMS = {"ffn_norm": "post_attention_layernorm"}
_SANDWICH_NORMS = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GLM4_NORMS = {
    "post_attention_norm": "post_self_attn_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
}
_INTERLEAVED = ("llama", "smollm3", "granite")  # architectures whose q and k converters permute
# These belong to the configuration, see gguf_config.
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"


def tensors_of(header: GgufHeader, config: ModelConfig) -> Tensors:
    """The tensors of a file, as a Hugging Face checkpoint of this model names and stores them.

    Raises:
      ValueError: for a tensor of an unknown name or a type that is not read.
    """
    stored: dict[str, StoredTensor] = {}
    dtype = _dtype(header)
    for tensor in header.tensors.values():
        if tensor.name in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS):
            continue
        if tensor.kind not in KINDS:
            known = ", ".join(sorted(kind.name for kind in KINDS))
            raise ValueError(
                f"{header.path}: {tensor.name} is stored as {tensor.kind.name}; known: {known}"
            )
        name = _hf_name(tensor.name, header, config)
        stored[name] = StoredTensor(header.path, tensor.name, tensor.shape, dtype)

    @contextlib.contextmanager
    def open_file() -> Iterator[TensorReader]:
        with (
            open(header.path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            yield _GgufReader(header, config, data).read

    return Tensors(where=str(header.path), stored=stored, open=open_file)


def read_vector(header: GgufHeader, name: str) -> np.ndarray:
    """The float32 vector `name`.

    Raises:
      ValueError: when the file has no such tensor, or it is no float32 vector.
    """
    tensor = header.tensors.get(name)
    if tensor is None or tensor.kind != GGMLQuantizationType.F32 or len(tensor.shape) != 1:
        raise ValueError(f"{name} must be a vector of F32")
    with open(header.path, "rb") as file:
        file.seek(tensor.start)
        return np.frombuffer(file.read(tensor.size), "<f4")


def _dtype(header: GgufHeader) -> str:
    """float32, unless all matrices of the file are float16, or all are bfloat16."""
    kinds = {tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1}
    return _HALVES.get(kinds.pop(), "F32") if len(kinds) == 1 else "F32"


def _hf_name(name: str, header: GgufHeader, config: ModelConfig) -> str:
    if name in _TOP:
        return _TOP[name]
    match = _LAYER.fullmatch(name)
    norms = _SANDWICH_NORMS if config.post_norms else _NORMS
    parts = _PARTS | (_GLM4_NORMS if config.model_type == "glm4" else norms)
    if match is None or match[2] not in parts:
        raise ValueError(f"{header.path}: unknown tensor {name!r} for {config.model_type}")
    part = parts[match[2]]
    if config.model_type in ("phi3", "glm4") and part == "mlp.up_proj":  # gate and up in one tensor
        part = "mlp.gate_up_proj"
    return f"model.layers.{match[1]}.{part}.{match[3]}"


@dataclasses.dataclass(frozen=True)
class _GgufReader:
    """Reads values in the layout of a Hugging Face checkpoint."""

    header: GgufHeader
    config: ModelConfig
    data: mmap.mmap

    def read(self, stored: StoredTensor, index: Index) -> np.ndarray:
        tensor = self.header.tensors[stored.name]
        if self._is_rotated(tensor):
            values = self._unrotated(tensor, index[0])
        else:
            values = self._rows(tensor, index[0])
        values = values[(slice(None), *index[1:])]
        if self.config.norm_offset and "norm" in tensor.name:
            values = values - 1  # converters store 1 + w, which checkpoints add when they run
        return values.astype(_NUMPY[stored.dtype], copy=False)

    def _rows(self, tensor: GgufTensor, rows: slice) -> np.ndarray:
        """Rows `rows` (elements, of a vector) as float32."""
        if len(tensor.shape) == 1:
            return self._values(tensor, tensor.start, tensor.row_bytes)[0][rows]
        per_row = tensor.size // tensor.shape[0]
        first, last = rows.start, rows.stop
        flat = self._values(tensor, tensor.start + first * per_row, (last - first) * per_row)
        return flat.reshape(last - first, *tensor.shape[1:])

    def _values(self, tensor: GgufTensor, start: int, size: int) -> np.ndarray:
        raw = np.frombuffer(self.data[start : start + size], np.uint8)
        # As one long row: the package walks through 16 rows at a time, which is slower.
        values = dequantize(raw.reshape(1, -1), tensor.kind)
        return values.astype(np.float32, copy=False).reshape(size // tensor.row_bytes, -1)

    def _is_rotated(self, tensor: GgufTensor) -> bool:
        """Whether the rows are in the order of an interleaved RoPE: q and k of Llama's kind."""
        architecture = self.header.metadata["general.architecture"]
        rotated = ".attn_q." in tensor.name or ".attn_k." in tensor.name
        return architecture in _INTERLEAVED and rotated

    def _unrotated(self, tensor: GgufTensor, rows: slice) -> np.ndarray:
        """Rows `rows`, with the two halves of each head one after the other."""
        heads = self.config.num_heads if ".attn_q." in tensor.name else self.config.num_kv_heads
        size = tensor.shape[0] // heads
        whole = slice(rows.start // size * size, -(-rows.stop // size) * size)  # whole heads
        values = self._rows(tensor, whole)
        pairs = values.reshape(-1, size // 2, 2, *tensor.shape[1:]).swapaxes(1, 2)
        return pairs.reshape(values.shape)[rows.start - whole.start : rows.stop - whole.start]
