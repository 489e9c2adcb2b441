"""Compute the filters of the policy qfilter for a model, from texts.

    lookahead train qfilters --model DIR --text FILE ... --out FILTERS.safetensors
    lookahead generate --model DIR --policy qfilter --policy-arg file=FILTERS.safetensors ...

The model reads windows of the texts; the main direction of each KV head's queries over all of them
is its filter (policies/qfilter.py).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tyro
from tqdm import tqdm

from lookahead_jax import EMBEDDED_MODEL
from lookahead_jax.checkpoints.load import Model, load
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.files import atomic_write
from lookahead_jax.kernels.reductions import reduce_group
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import embed, scan_layers
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.model.jit import program
from lookahead_jax.model.layer_attention import layer_kinds
from lookahead_jax.model.params import Params
from lookahead_jax.policies.qfilter import TENSOR, QFilter, QuerySums, filters_of
from lookahead_jax.prefilling.layer_pass import layer_buffers, prompt_layer, prompt_layout
from lookahead_jax.train.progress import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Compute the filters of the policy qfilter from texts."""

    text: tuple[Path, ...]
    """Text files (UTF-8), such as the prompts to come."""
    out: Path
    """Safetensors file for the filters."""
    model: Path | None = None
    """Folder of the model. Default: the embedded model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; None: that of the checkpoint."""
    length: int = 1024
    """Tokens that are read at a time: directions depend on positions, so long ones are better."""
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


@program(static_argnames=("config",))
def query_sums(params: Params, tokens: jax.Array, *, config: ModelConfig) -> QuerySums:
    """Sums over the queries of each layer, [L, B, N, ...], for prompts int32 [B, T]."""
    tokens, prompt = prompt_layout(tokens, 0, None, config)
    x = embed(params, tokens, config=config)
    policy = QFilter()

    def step(carry, inputs):
        p, _, kind = inputs
        x, buffers = carry
        read = prompt_layer(p, x, buffers, prompt, kind, policy=policy, config=config)
        return (read.x, read.buffers), read.stats

    carry = (x, layer_buffers(prompt, x.dtype, config))
    return scan_layers(step, carry, params["layers"], None, layer_kinds(config))[1]


def compute_filters(model: Model, windows: Iterable[np.ndarray]) -> np.ndarray:
    """The filter of every layer and KV head, float32 [L, K, H], from windows int32 [T]."""
    total = None
    for window in windows:
        sums = query_sums(model.params, jnp.asarray(window[None]), config=model.config)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        raise ValueError("filters need at least one window of text")
    heads = filters_of(jax.tree.map(lambda a: a[:, 0], total))
    return np.asarray(reduce_group(heads, model.config.num_kv_heads, "mean"))


def write_filters(config: FilterConfig) -> None:
    """Computes the filters and writes them to `config.out`."""
    if config.length < 1 or config.windows < 1:
        raise ValueError(
            f"--length {config.length} and --windows {config.windows} must be at least 1"
        )
    say(f"loading {config.model or 'the embedded model'}")
    model = load(config.model or EMBEDDED_MODEL, dtype=config.dtype)
    windows = windows_of(model, config.text, length=config.length, most=config.windows)
    filters = compute_filters(model, tqdm(windows, unit=" windows", desc="reading"))
    about = {"format": "pt", "base_fingerprint": fingerprint(model.params)}
    atomic_write(config.out, safetensors.numpy.save({TENSOR: filters}, about))
    say(f"{config.out}: filters of {len(filters)} layers from {len(windows)} windows")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    prog = "lookahead train qfilters"
    return run_command(
        lambda: tyro.cli(FilterConfig, args=args, prog=prog), write_filters, prog=prog
    )


if __name__ == "__main__":
    end_process(main())
