"""`lookahead generate`: continue a prompt from a budgeted cache."""

import json
from dataclasses import dataclass

from lookahead_jax.commands.options import File, RunOptions
from lookahead_jax.files import atomic_write, check_parent


@dataclass(frozen=True, kw_only=True)
class Generate(RunOptions):
    """Continue a prompt; the text streams to the standard output."""

    json: File = None
    """Also write tokens, text, cache size and timing as JSON to this file."""


def main(config: Generate) -> None:
    if config.json is not None:
        check_parent(config.json)
    model = config.source.load()
    prompts = config.input.read(model)
    alone = len(prompts) == 1
    result = config.run(model, prompts, on_text=_stream if alone else None)
    if alone:
        print()
    else:
        for row, text in enumerate(result.text):
            print(f"[{row}] {text}")
    if config.json is not None:
        atomic_write(config.json, json.dumps(result.report(), indent=2, allow_nan=False) + "\n")


def _stream(row: int, text: str) -> None:
    print(text, end="", flush=True)
