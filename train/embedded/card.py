"""The model card of the embedded base model."""

import json
import pathlib
from typing import Any

import numpy as np

CARD = """\
# Base model of lookahead_jax

A small Llama-style decoder that ships with the package, so that every command works without a
download. It continues Python source code and answers lookups in its prompt. It demonstrates cache
eviction on a CPU. It is not a chat assistant: it follows no instructions and knows no facts.

Format: `config.json` (`model_type` llama, tied embeddings), `model.safetensors` (float32), byte-
level BPE in `tokenizer.json`. Rows were at most {{longest}} tokens long in training; positions up
to 2048 were trained by random gaps between positions, so accuracy is lower on longer prompts (see
the table).

## What it was trained on

1. Python sources with their docstrings: the standard library and installed, permissively licensed
packages.

{{sources}}

Files were clustered by content (MinHash over runs of three lines). One file per cluster was used,
and whole clusters were held out. {{split}}

2. Synthetic documents with questions (`eval/tasks`): lookups, records, ordered extraction by tag,
marked spans, chains; and plain copies. Every document is new, and its words are single tokens. Half
of the documents are surrounded by lines of training text.

## Measured

Held-out text (windows of 512 tokens, no overlap):

{{figures}}

Exact match of greedy decoding (by teacher forcing) with the full cache on new prompts, with 95 %
Wilson intervals:

{{accuracy}}

`lookup` asks for 1 of 48 names, `multi_lookup` for 4 of 48; `records` for the six fields of one
of 8 schemas, which the question does not name; `tagged` for the six values of one of 6 tags in
the order of the document; `spans` for one of 4 spans of 12 words; `chains` for 4 hops among 14
chains. A row of `tagged` also names the previous value of its tag: without it, an earlier model of
this size found the first value of a tag but not the order of the others.

## Loss over training

Text loss is in nats per token, task loss in nats per answer token, both on training rows. Half of
the tokens are text. No document was used twice.

{{curves}}

## Examples

Greedy continuations of three prompts, not selected:

{{completions}}
## Recipe

Muon for the matrices, Adam for embeddings and norms; constant rates after the warm-up, then linear
decay to zero. Float32 on one CPU core. There were two runs. The second one started from the weights
of the first (`start`), with raised rates and a single linear decay.

The stages of the first run were chosen while it ran. For 850 steps, the task rows had the form
` name = value` and copies had a fixed distance; the model learned no lookup. With values next to
their names and copies at varying distances, it learned them within 200 steps. The length of the
last stage, and therefore the decay, was changed at steps 1050, 1350 and 1500. The first run's rows
of `tagged` did not name the previous value, and it had at most 4 tags and 10 chains; the second run
has the present tasks. Each run used one seed and was not repeated, so another run of this recipe
may give another result.

{{recipes}}

    python -m lookahead_jax.train.embedded.corpus --out CORPUS
    python -m lookahead_jax.train.embedded.base --corpus CORPUS --out FIRST
    python -m lookahead_jax.train.embedded.base --corpus CORPUS --out RUN --start FIRST ...
    python -m lookahead_jax.train.embedded.package --corpus CORPUS --run RUN \\
        --out lookahead_jax/assets/base

The corpus depends on the versions of the packages above, so weights trained elsewhere differ.

## Licence

Apache-2.0, like the package. `../example.txt` is a file of the Python standard library that was
held out of training (PSF-2.0, see its first lines).
"""


def loss_curve(run: pathlib.Path, points: int = 16) -> list[str]:
    """The metrics of a run as a table, averaged over intervals of equal length."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    lines = list({line["step"]: line for line in lines}.values())
    seen, rows = 0, ["| steps | tokens | length | text loss | task loss | answer tokens right |"]
    rows.append("|---" * 6 + "|")
    for part in np.array_split(np.arange(len(lines)), points):
        group = [lines[i] for i in part]
        seen += sum(line["tokens"] for line in group)
        names = ("text_loss", "task_loss", "task_right")
        means = [np.mean([line[name] for line in group]) for name in names]
        rows.append(
            f"| {group[-1]['step'] + 1} | {seen / 1e6:.2f} M | {group[-1]['length']} | "
            + " | ".join(f"{m:.3f}" for m in means)
            + " |"
        )
    return rows


def lineage(run: pathlib.Path) -> list[tuple[pathlib.Path, dict[str, Any]]]:
    """The runs that led to this one and their settings, the first one first."""
    recipe = json.loads((run / "run.json").read_text("utf-8"))
    start = recipe.get("start")
    before = [] if start in (None, "None") else lineage(pathlib.Path(start))
    recipe = {name: recipe[name] for name in recipe if name not in ("corpus", "out")}
    if before:
        recipe["start"] = "the run above"
    return [*before, (run, recipe)]


def card(corpus: pathlib.Path, run: pathlib.Path, sections: dict[str, list[str]]) -> str:
    """The model card: a fixed text with the measured sections filled in."""
    manifest = json.loads((corpus / "manifest.json").read_text("utf-8"))
    runs = lineage(run)
    sources = [
        f"| {name} | {s['version']} | {s['license']} | {s['files']} | {s['bytes'] / 1e6:.1f} MB |"
        for name, s in manifest["sources"].items()
        if not s.get("missing")
    ]
    text = CARD
    parts = {
        "sources": "\n".join(
            ["| source | version | licence | files | text |", "|---" * 5 + "|", *sources]
        ),
        "longest": str(max(length for _, recipe in runs for length in recipe["lengths"])),
        "curves": "\n\n".join("\n".join(loss_curve(path)) for path, _ in runs),
        "recipes": "\n\n".join(
            "```json\n" + json.dumps(recipe, indent=1) + "\n```" for _, recipe in runs
        ),
        "split": " ".join(
            f"{k}: {v['files']} files, {v['tokens'] / 1e6:.2f} M tokens."
            for k, v in manifest.items()
            if k in ("train", "valid")
        ),
        **{name: "\n".join(lines) for name, lines in sections.items()},
    }
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", part)
    return text
