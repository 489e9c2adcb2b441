"""Statistics of a model's queries over texts, for the policies qfilter and triattention.

The model reads windows of the texts, without gradients; a policy's own accumulator gathers the
queries, as it does over a prompt.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from tqdm import tqdm

from lookahead_jax import EMBEDDED_MODEL
from lookahead_jax.checkpoints.load import Model, load
from lookahead_jax.host.files import atomic_write
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import embed, scan_layers
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.model.jit import program
from lookahead_jax.model.layer_attention import layer_kinds
from lookahead_jax.model.params import Params
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.view import Stats
from lookahead_jax.prefilling.layer_pass import layer_buffers, prompt_layer, prompt_layout
from lookahead_jax.train.progress import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """What is read, and where the result goes."""

    text: tuple[Path, ...]
    """Text files (UTF-8), such as the prompts to come."""
    out: Path
    """Safetensors file for the result."""
    model: Path | None = None
    """Folder of the model. Default: the embedded model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; None: that of the checkpoint."""
    length: int = 1024
    """Tokens that are read at a time."""
    windows: int = 64
    """Most windows of this length, evenly spread over the texts."""


def windows_of(model: Model, texts: Sequence[Path], *, length: int, most: int) -> list[np.ndarray]:
    """At most `most` windows of the texts, int32 [length] each; the last of a text is padded (-1).

    Raises ValueError for a file that is not UTF-8 or holds no text.
    """
    if model.tokenizer is None:
        raise ValueError(f"{model.path} has no tokenizer.json, and texts need one")
    windows = []
    for path in texts:
        try:
            ids = model.tokenizer.encode(path.read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
        for first in range(0, len(ids), length):
            row = np.full(length, -1, np.int32)
            part = ids[first : first + length]
            row[: len(part)] = part
            windows.append(row)
    if not windows:
        raise ValueError(f"--text {' '.join(map(str, texts))}: there is no text in it")
    chosen = np.linspace(0, len(windows) - 1, min(most, len(windows))).round().astype(int)
    return [windows[i] for i in chosen]


@program(static_argnames=("policy", "config"))
def query_statistics(
    params: Params, tokens: jax.Array, *, policy: Policy, config: ModelConfig
) -> Stats:
    """What `policy` accumulates over the queries of prompts int32 [B, T]: arrays [L, B, ...]."""
    tokens, prompt = prompt_layout(tokens, 0, None, config)
    x = embed(params, tokens, config=config)

    def step(carry, inputs):
        p, _, kind = inputs
        x, buffers = carry
        read = prompt_layer(p, x, buffers, prompt, kind, policy=policy, config=config)
        return (read.x, read.buffers), read.stats

    carry = (x, layer_buffers(prompt, x.dtype, config))
    return scan_layers(step, carry, params["layers"], None, layer_kinds(config))[1]


def sum_statistics(model: Model, windows: Iterable[np.ndarray], policy: Policy) -> Any:
    """The sums of `policy` over windows int32 [T] of text: arrays [L, ...]."""
    total = None
    for window in windows:
        row = jnp.asarray(window[None])
        sums = query_statistics(model.params, row, policy=policy, config=model.config)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        raise ValueError("statistics need at least one window of text")
    return jax.tree.map(lambda a: a[:, 0], total)


def read_texts(config: StatisticsConfig, policy: Policy) -> tuple[Model, Any]:
    """The model, and the sums of `policy` over the texts: arrays [L, ...]."""
    if config.length < 1 or config.windows < 1:
        raise ValueError(
            f"--length {config.length} and --windows {config.windows} must be at least 1"
        )
    say(f"loading {config.model or 'the embedded model'}")
    model = load(config.model or EMBEDDED_MODEL, dtype=config.dtype)
    windows = windows_of(model, config.text, length=config.length, most=config.windows)
    progress = tqdm(windows, unit=" windows", desc="reading")
    return model, sum_statistics(model, progress, policy)


def write_statistics(config: StatisticsConfig, model: Model, **tensors: np.ndarray) -> None:
    """Writes tensors [L, ...] to `config.out`, with the fingerprint of the model."""
    about = {"format": "pt", "base_fingerprint": fingerprint(model.params)}
    atomic_write(config.out, safetensors.numpy.save(tensors, about))
    say(f"{config.out}: {', '.join(tensors)} of {model.config.num_layers} layers")
