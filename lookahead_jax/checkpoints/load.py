"""Loads a Hugging Face model directory straight into (sharded) parameters, and saves one."""

import contextlib
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike
from safetensors import safe_open
from safetensors.numpy import save_file

from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.checkpoints.hf_files import (
    SINGLE,
    StoredTensor,
    listing,
    read_json,
    stored_tensors,
)
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.host.files import atomic_path
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.params import (
    Params,
    Spec,
    from_stored,
    shape,
    specs,
    stored_index,
    stored_shape,
    to_checkpoint,
    tree,
)
from lookahead_jax.model.sharding import param_shardings

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# Names that say "language model" in multimodal Gemma 3, of transformers 4 and 5.
_TEXT_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
_ROTARY_BUFFER = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # recomputed from the config


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
class Model:
    """A loaded checkpoint: everything `generate` needs."""

    params: Params
    config: ModelConfig
    tokenizer: Tokenizer | None
    """None if the directory has no tokenizer.json; then tokens go in and out."""
    generation: GenerationDefaults
    path: Path


def first_layers(model: Model, count: int) -> Model:
    """The model cut off after its first layers: a small model with the same tokens.

    Nothing trains it to end there, so it guesses worse than a model of that size could. Raises
    ValueError for more layers than there are.
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
    directory: str | os.PathLike, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> Model:
    """Loads a Hugging Face model directory.

    Args:
      directory: holds config.json and safetensors; tokenizer.json, a chat template and
        generation_config.json are read when present.
      dtype: of the parameters; None keeps the checkpoint's own.
      mesh: where the parameters go (`sharding.make_mesh`); None is one device.

    Raises:
      FileNotFoundError: when the directory, config.json or a weight file is missing.
      ValueError: for anything malformed, unsupported or inconsistent, naming file and remedy.
    """
    path = Path(directory)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory")
    hf = read_json(path, "config.json")
    if hf is None:
        raise FileNotFoundError(f"{path}: has no config.json, so it is not a model directory")
    try:
        config = config_from_hf(hf)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    generation = _generation_defaults(path, hf)
    tokenizer = Tokenizer.load(path)
    params = load_params(path, config, dtype, mesh)
    return Model(
        params=params, config=config, tokenizer=tokenizer, generation=generation, path=path
    )


def load_params(
    directory: str | os.PathLike,
    config: ModelConfig,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> Params:
    """Reads the weights of a directory; each process reads only the slices its devices hold.

    All names, shapes and dtypes are checked before anything is allocated. Rotary buffers, the
    vision part of Gemma 3 and the second copy of a tied head are ignored; nothing else is.

    Raises:
      FileNotFoundError, ValueError: as `load`.
    """
    stored = _matched(stored_tensors(Path(directory)), config, Path(directory))
    dtype = _own_dtype(stored) if dtype is None else np.dtype(dtype)
    if mesh is None:
        one = SingleDeviceSharding(jax.local_devices()[0])
        shardings = tree({path: one for path in specs(config)})
    else:
        shardings = param_shardings(config, mesh)
    with contextlib.ExitStack() as stack:
        files = {
            file: stack.enter_context(safe_open(file, framework="numpy"))
            for file in sorted({tensor.file for tensor in stored.values()})
        }

        def read(path: str, spec: Spec, sharding: jax.sharding.Sharding) -> jax.Array:
            sizes = shape(spec.axes, config)
            blocks: dict[tuple, np.ndarray] = {}  # devices that hold the same block share a read

            def block(index: Any) -> np.ndarray:
                bounds = tuple(s.indices(n)[:2] for s, n in zip(index, sizes, strict=True))
                if bounds not in blocks:
                    slices = tuple(slice(*bound) for bound in bounds)
                    blocks[bounds] = _read_block(spec, slices, config, dtype, stored, files)
                return blocks[bounds]

            return jax.make_array_from_callback(sizes, sharding, block)

        table = specs(config)
        where = tree({path: path for path in table})
        return jax.tree.map(lambda path, s: read(path, table[path], s), where, shardings)


def save_params(directory: str | os.PathLike, params: Params, config: ModelConfig) -> None:
    """Writes `model.safetensors` under Hugging Face names into an existing directory, atomically.

    config.json and tokenizer files are the caller's.
    """
    with atomic_path(Path(directory) / SINGLE) as temporary:
        save_file(to_checkpoint(params, config), temporary, metadata={"format": "pt"})


def _matched(
    tensors: dict[str, StoredTensor], config: ModelConfig, directory: Path
) -> dict[str, StoredTensor]:
    """The tensors the model needs, by canonical name, once their names and shapes are checked."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if _ROTARY_BUFFER.search(name):
            continue
        if config.model_type == "gemma3_text" and _VISION.match(name):
            continue
        canonical = _canonical(name, bare="embed_tokens.weight" in tensors)
        if canonical in found:
            raise ValueError(f"{directory}: {name} and {found[canonical].name} are the same tensor")
        found[canonical] = tensor
    if config.tie_embeddings:
        found.pop("lm_head.weight", None)

    expected = {
        spec.tensor.format(layer=layer): stored_shape(spec, config)
        for spec in specs(config).values()
        for layer in range(config.num_layers if spec.stacked else 1)
    }
    for problem, names in (
        ("lacks tensors that config.json calls for", expected.keys() - found.keys()),
        ("has tensors that config.json does not call for", found.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(
                f"{directory}: the checkpoint {problem}: {listing(sorted(names))}; "
                "config.json and weights must belong together"
            )
    for name, tensor in found.items():
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
    return found


def _canonical(name: str, *, bare: bool) -> str:
    for prefix, replacement in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    # Saved without its head, a model's tensors have no "model." in front.
    return f"model.{name}" if bare and name != "lm_head.weight" else name


def _own_dtype(stored: dict[str, StoredTensor]) -> np.dtype:
    names = {tensor.dtype: tensor for tensor in stored.values()}
    if len(names) > 1:
        examples = ", ".join(f"{t.name} as {dtype}" for dtype, t in sorted(names.items()))
        raise ValueError(f"the checkpoint mixes dtypes ({examples}); choose one with dtype=")
    return np.dtype(_DTYPES[next(iter(names))])


def _read_block(
    spec: Spec,
    index: tuple[slice, ...],
    config: ModelConfig,
    dtype: np.dtype,
    stored: dict[str, StoredTensor],
    files: dict[Path, Any],
) -> np.ndarray:
    """The values of one parameter at `index`, gathered from the tensors of its layers."""
    layers, inner = (index[0], index[1:]) if spec.stacked else (slice(0, 1), index)
    out = np.empty([layers.stop - layers.start, *(s.stop - s.start for s in inner)], dtype)
    for place, layer in enumerate(range(layers.start, layers.stop)):
        tensor = stored[spec.tensor.format(layer=layer)]
        block = files[tensor.file].get_slice(tensor.name)[stored_index(spec, config, inner)]
        with np.errstate(over="ignore"):  # reported below, with names
            out[place] = from_stored(spec, config, block, inner)
        if dtype == np.float16 and not np.isfinite(out[place]).all():
            raise ValueError(
                f"{tensor.file}: {tensor.name} does not fit float16; load it as bfloat16 or float32"
            )
    return out if spec.stacked else out[0]


def _generation_defaults(directory: Path, hf: dict[str, Any]) -> GenerationDefaults:
    # generation_config.json wins over what config.json says, field by field.
    text = hf.get("text_config")
    fields = (text if isinstance(text, dict) else {}) | hf
    fields |= read_json(directory, "generation_config.json") or {}

    def number(name: str, kind: type) -> Any:
        value = fields.get(name)
        if value is None or (kind is float and type(value) is int):
            return value
        if type(value) is not kind:
            raise ValueError(f"{directory}: {name} must be of type {kind.__name__}, got {value!r}")
        return value

    eos = fields.get("eos_token_id")
    eos_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(token) is int and token >= 0 for token in eos_ids):
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
