"""The tensors of a GGUF file under their Hugging Face names, dequantised while they are read."""

import contextlib
import dataclasses
import mmap
import re
from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from lookahead_jax.checkpoints.gguf_header import GgufHeader, GgufTensor
from lookahead_jax.checkpoints.source import Index, StoredTensor, TensorReader, Tensors
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.params import parameter_specs

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
        "MXFP4",
    ]
)
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_HALVES = {GGMLQuantizationType.F16: "F16", GGMLQuantizationType.BF16: "BF16"}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = re.compile(r"blk\.(\d{1,5})\.(\w+?)(?:\.(\d{1,5}))?\.(weight|bias)")
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
_GPT_OSS_NORMS = {"post_attention_norm": "post_attention_layernorm"}
# Parts with other names in mixtures, by their place in the table of parameters. Files of early 2024
# have one tensor per expert (blk.0.ffn_gate.3.weight), later ones a tensor of all of them.
_EXPERTS = {f"ffn_{name}_exps": f"layers.{name}" for name in ("gate", "up", "down")}
_EXPERT = {f"ffn_{name}": f"layers.{name}" for name in ("gate", "up", "down")}
_ROUTER = "ffn_gate_inp"
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
    places: dict[str, GgufTensor] = {}
    dtype = _dtype(header)
    for tensor in header.tensors.values():
        if tensor.name in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS):
            continue
        if tensor.kind not in KINDS:
            known = ", ".join(sorted(kind.name for kind in KINDS))
            raise ValueError(f"{tensor.name} is stored as {tensor.kind.name}; known: {known}")
        for name, place in _named(tensor, config):
            if name in stored:
                raise ValueError(f"{stored[name].name} and {place.name} are the same tensor")
            stored[name] = StoredTensor(header.path, place.name, place.shape, dtype)
            places[place.name] = place
    interleaved = header.metadata["general.architecture"] in _INTERLEAVED

    @contextlib.contextmanager
    def open_file() -> Iterator[TensorReader]:
        with (
            open(header.path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            yield _GgufReader(places, config, interleaved, data).read

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
    """float32, unless all matrices but routers are float16, or all are bfloat16."""
    kinds = {
        tensor.kind
        for tensor in header.tensors.values()
        if len(tensor.shape) > 1 and tensor.name.endswith("weight") and _ROUTER not in tensor.name
    }
    return _HALVES.get(kinds.pop(), "F32") if len(kinds) == 1 else "F32"


def _named(tensor: GgufTensor, config: ModelConfig) -> Iterator[tuple[str, GgufTensor]]:
    """The tensors of a Hugging Face checkpoint that this one holds, and where."""
    if tensor.name in _TOP:
        yield _TOP[tensor.name], tensor
        return
    match = _LAYER.fullmatch(tensor.name)
    if match is None:
        raise _unknown(tensor, config)
    layer, part, expert, suffix = int(match[1]), match[2], match[3], match[4]
    specs = parameter_specs(config)

    def named(path: str, *place: int) -> str:
        path = path + "_bias" if suffix == "bias" else path
        if path not in specs:
            raise _unknown(tensor, config)
        return specs[path].tensor_at((layer, *place))

    if config.experts is not None and expert is not None and part in _EXPERT:
        yield named(_EXPERT[part], int(expert)), tensor
    elif expert is not None:
        raise _unknown(tensor, config)
    elif config.experts is not None and part in _EXPERTS:
        count = config.experts.count
        if tensor.shape[0] != count or len(tensor.shape) < 2:
            raise ValueError(
                f"{tensor.name} has shape {tensor.shape}, but the file says {count} experts"
            )
        for number, place in enumerate(_split(tensor, count)):
            yield named(_EXPERTS[part], number), place
    elif config.experts is not None and part == _ROUTER:
        yield named("layers.router"), tensor
    elif config.attn_sinks and part == "attn_sinks":
        yield named("layers.sinks"), tensor
    elif part == "attn_qkv" and config.model_type == "glm":
        yield from _query_key_value(tensor, config, named)
    else:
        yield _plain_name(tensor, layer, part, suffix, config), tensor


def _unknown(tensor: GgufTensor, config: ModelConfig) -> ValueError:
    return ValueError(f"unknown tensor {tensor.name!r} for {config.model_type}")


def _plain_name(tensor: GgufTensor, layer: int, part: str, suffix: str, config: ModelConfig) -> str:
    norms = _SANDWICH_NORMS if config.post_norms else _NORMS
    norms = {"glm4": _GLM4_NORMS, "gpt_oss": _GPT_OSS_NORMS}.get(config.model_type, norms)
    parts = _PARTS | norms
    if part not in parts:
        raise _unknown(tensor, config)
    name = parts[part]
    if config.model_type in ("phi3", "glm", "glm4") and name == "mlp.up_proj":
        name = "mlp.gate_up_proj"  # gate and up in one tensor
    return f"model.layers.{layer}.{name}.{suffix}"


def _split(tensor: GgufTensor, count: int) -> Iterator[GgufTensor]:
    """The entries along the first of several axes."""
    shape, size = tensor.shape[1:], tensor.size // count
    for number in range(count):
        yield GgufTensor(
            f"{tensor.name}[{number}]", shape, tensor.kind, tensor.start + number * size,
            tensor.row_bytes,
        )  # fmt: skip


def _query_key_value(
    tensor: GgufTensor, config: ModelConfig, named: Callable[[str], str]
) -> Iterator[tuple[str, GgufTensor]]:
    """The parts of a matrix or bias of queries, keys and values."""
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    rows = {name: count * config.head_dim for name, count in heads.items()}
    if tensor.shape[0] != sum(rows.values()):
        raise ValueError(f"{tensor.name} has {tensor.shape[0]} rows, not {sum(rows.values())}")
    first, per_row = 0, tensor.size // tensor.shape[0]
    for name, count in rows.items():
        row_bytes = tensor.row_bytes if len(tensor.shape) > 1 else count * per_row
        yield named(f"layers.{name}"), GgufTensor(
            f"{tensor.name}[{name}]", (count, *tensor.shape[1:]), tensor.kind,
            tensor.start + first * per_row, row_bytes,
        )  # fmt: skip
        first += count


@dataclasses.dataclass(frozen=True)
class _GgufReader:
    """Reads values in the layout of a Hugging Face checkpoint."""

    places: Mapping[str, GgufTensor]
    config: ModelConfig
    interleaved: bool
    """Whether q and k are in the order of an interleaved RoPE."""
    data: mmap.mmap

    def read(self, stored: StoredTensor, index: Index) -> np.ndarray:
        tensor = self.places[stored.name]
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
        return self.interleaved and (".attn_q." in tensor.name or ".attn_k." in tensor.name)

    def _unrotated(self, tensor: GgufTensor, rows: slice) -> np.ndarray:
        """Rows `rows`, with the two halves of each head one after the other."""
        heads = self.config.num_heads if ".attn_q." in tensor.name else self.config.num_kv_heads
        size = tensor.shape[0] // heads
        whole = slice(rows.start // size * size, -(-rows.stop // size) * size)  # whole heads
        values = self._rows(tensor, whole)
        pairs = values.reshape(-1, size // 2, 2, *tensor.shape[1:]).swapaxes(1, 2)
        return pairs.reshape(values.shape)[rows.start - whole.start : rows.stop - whole.start]
