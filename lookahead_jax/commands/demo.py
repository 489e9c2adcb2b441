"""`lookahead demo`: a long file with the full cache and with an evicted one, side by side."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from lookahead_jax.commands.options import EvictionOptions, File, ModelOptions, option


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Continue a long file with the full cache and with an evicted one, and compare."""

    file: Annotated[tyro.conf.Positional[File], option("FILE")] = None
    """A text file (UTF-8); left out, an example that ships with the package."""
    source: ModelOptions = field(default_factory=ModelOptions)
    eviction: EvictionOptions = field(default_factory=EvictionOptions)
    max_new_tokens: int = 64
    """Tokens to generate."""


def main(config: Demo) -> None:
    raise NotImplementedError
