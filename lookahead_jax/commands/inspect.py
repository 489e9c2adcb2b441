"""`lookahead inspect`: a page that shows which prompt tokens the cache kept."""

from dataclasses import dataclass
from pathlib import Path

from lookahead_jax.commands.options import OutFile, RunOptions, Text
from lookahead_jax.files import atomic_write, check_parent
from lookahead_jax.inspect import render


@dataclass(frozen=True, kw_only=True)
class Inspect(RunOptions):
    """Write an HTML page on which every prompt token shows how many heads kept it."""

    out: OutFile = Path("inspect.html")
    """The page to write."""
    mark: Text = None
    """Underline this text wherever it stands in the prompt, and count how much of it was kept."""


def main(config: Inspect) -> None:
    check_parent(config.out)
    model = config.source.load()
    prompts = config.input.read(model)
    if len(prompts) != 1:
        raise ValueError(f"inspect shows one prompt; {config.input.tokens} holds {len(prompts)}")
    result = config.run(model, prompts)
    page = render(
        prompt="",
        offsets=[],
        pieces=[],
        kept=[],
        generated=result.text[0],
        facts={},
        mark=config.mark,
    )
    atomic_write(config.out, page)
    print(config.out)
