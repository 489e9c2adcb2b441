"""`lookahead convert`: any checkpoint that is read, as a Hugging Face folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lookahead_jax.cli.options import option


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a model, such as a GGUF file, to a Hugging Face folder."""

    source: Annotated[tyro.conf.Positional[Path], option("SRC")]
    """The model: whatever --model of the other commands takes."""
    out: Annotated[tyro.conf.Positional[Path], option("OUT")]
    """The folder to write; it must be new or empty."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, option("DTYPE")] = None
    """Type of the weights: float32, bfloat16 or float16. Default: that of the checkpoint, which is
    float32 if it is quantised."""


def main(config: Convert) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed
    from lookahead_jax.checkpoints.convert import convert

    convert(config.source, config.out, dtype=config.dtype)
    print(config.out)
