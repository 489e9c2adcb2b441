"""Write the modules of a recipe as they ship: in float16, with a model card.

    python -m lookahead_jax.train.recipe.package CONFIG [the recipe's options] --out FOLDER

CONFIG and options are those of the run (`lookahead train recipe`), which may be unfinished. FOLDER
receives the modules and README.md: the recipe, its data, and its loss.
"""

import collections
import dataclasses
import json
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lookahead_jax.checkpoints.load import load
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.files import atomic_write, make_folder
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.modules.files import load_modules, save_modules
from lookahead_jax.train.recipe.recipe import RecipeConfig, folder_of, parse_config, prompt_file

_CARD = """\
# Lookahead modules for {model}

{tokens} lookahead tokens and a LoRA of rank {rank} on {targets}, for the base model whose
fingerprint is in `lookahead_config.json`; {megabytes:.2f} MB in float16. The base model is not
changed. The policy `lookaheadkv` reads them; `--model {model}` finds them by itself.

Evaluation results are in docs/results.md.

## Data

{rows:,} prompts of {shortest} to {longest} tokens ({prompt_tokens:,} in all), and the model's own
greedy responses of at most {max_response} tokens. The prompts are chats about documentation and
sources of Python and of installed packages, in wordings of the recipe's own:

{kinds}

The wordings of RULER, the files that the evaluation reads, and a tenth of all documents were held
out. Seed of the prompts: {prompt_seed}; they depend on the versions of the installed packages.

## Training

{steps} of {all_steps} steps of {batch} rows: each prompt was learned from about {epochs:.1f} times.
{loss}

{curve}

```json
{recipe}
```

    lookahead train recipe {command}
{start}
## Licence

Apache-2.0, like the package.
"""
_PROG = "python -m lookahead_jax.train.recipe.package"
_PLACES = ("--folder", "--run", "--out")
_START = "--start"
_CARD_FILE = "README.md"
_LOSS = {
    "mean": "The loss is the paper's: KL of the response's mean attention to that of the tokens.",
    "max": "The target is the largest attention that any token of the response pays to an entry.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackageConfig(RecipeConfig):
    """Write the modules of a recipe's run in float16, with a model card. The options are those of
    `lookahead train recipe`, and --out."""

    out: Path
    """Folder that receives the modules and README.md."""


def write_package(config: PackageConfig, given: Sequence[str]) -> None:
    """Writes the modules of the recipe's run and their card; `given` are the recipe's arguments.

    Raises FileNotFoundError if the run has no modules yet, ValueError if they belong to another
    model.
    """
    folder = folder_of(config)
    run = folder / config.run
    model = load(config.model)
    modules = load_modules(run / "modules", params=model.params, config=model.config)
    rows = [
        json.loads(line)
        for shard in range(config.shards)
        for line in prompt_file(folder, shard).read_text("utf-8").splitlines()
    ]
    save_modules(make_folder(config.out), modules, params=model.params, dtype=np.float16)
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    atomic_write(config.out / _CARD_FILE, _card(config, modules, rows, log, given))


def _card(
    config: RecipeConfig,
    modules: LookaheadModules,
    rows: Sequence[dict[str, Any]],
    log: Sequence[dict[str, Any]],
    given: Sequence[str],
) -> str:
    values = modules.embeddings.size + sum(
        pair[part].size for pair in modules.lora.values() for part in pair
    )
    described = json.loads((folder_of(config) / config.run / "config.json").read_text("utf-8"))
    kept = {
        name: described[name]
        for name in ("modules", "optimizer", "loss", "steps", "batch", "dtype")
    }
    loss = _LOSS[config.loss.response]
    if config.loss.skip:
        loss += f" The first {config.loss.skip} entries of a prompt, attention sinks, do not count."
    if config.hide_question:
        loss += (
            f" In {config.hide_question:.0%} of the prompts with a question behind their text, the "
            "tokens stand before the question, and question and answer together are the response."
        )
    if config.loss.memory:
        budgets = ", ".join(map(str, config.loss.budgets))
        loss += (
            f" Added with weight {config.loss.memory}: the divergence of the response's next "
            f"tokens on caches cut to {budgets} entries, the tokens' own among them."
        )
    return _CARD.format(
        model=config.model, tokens=modules.config.tokens, rank=modules.config.rank,
        targets=", ".join(modules.config.targets), megabytes=2 * values / 1e6,
        rows=len(rows), shortest=config.shortest, longest=config.longest,
        prompt_tokens=sum(row["tokens"] for row in rows), max_response=config.max_response,
        kinds=_kinds(rows), prompt_seed=config.prompt_seed, steps=len(log),
        all_steps=config.steps, batch=config.batch, epochs=len(log) * config.batch / len(rows),
        loss=textwrap.fill(f"Seed {config.seed}. {loss}", 96), curve=_curve(log),
        recipe=json.dumps(kept, indent=1), command=shlex.join(_without_places(given)),
        start=_started(config.start),
    )  # fmt: skip


def _started(start: Path | None) -> str:
    """What a card says of the modules that a run began with: their own card, one level deeper."""
    if start is None:
        return ""
    card = start / _CARD_FILE
    if not card.is_file():
        return "\nThe run began with trained modules, MODULES, which have no card.\n"
    text = card.read_text("utf-8").partition("## Licence")[0]
    deeper = "".join(
        f"##{line}" if line.startswith("#") else line for line in text.splitlines(keepends=True)
    )
    return f"\nThe run began with trained modules, MODULES, whose card follows.\n\n{deeper}"


def _without_places(given: Sequence[str]) -> list[str]:
    """A recipe's arguments without the folders of one machine; MODULES stands for --start's."""
    kept, skip = [], False
    for arg in given:
        name = arg.split("=")[0]
        if not skip and name == _START:
            kept += [_START, "MODULES"]
        elif not skip and name not in _PLACES:
            kept.append(arg)
        skip = not skip and name in (*_PLACES, _START) and name == arg
    return kept


def _kinds(rows: Sequence[dict[str, Any]]) -> str:
    """How many prompts there are of each kind, as a table."""
    counts = collections.Counter(row["kind"] for row in rows).most_common()
    return "\n".join(["| kind | prompts |", "|---|---:|", *(f"| {k} | {n} |" for k, n in counts)])


def _curve(log: Sequence[dict[str, Any]], points: int = 12) -> str:
    """The loss of a run as a table, averaged over intervals of equal length."""
    lines, rows = ["| steps | loss, nats |", "|---:|---:|"], 0
    for part in np.array_split([line["loss"] for line in log], min(points, len(log))):
        rows += len(part)
        lines.append(f"| {rows} | {part.mean():.4f} |")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    given = list(sys.argv[1:] if args is None else args)
    return run_command(
        lambda: parse_config(PackageConfig, given, _PROG),
        lambda config: write_package(config, given),
        prog=_PROG,
    )


if __name__ == "__main__":
    end_process(main())
