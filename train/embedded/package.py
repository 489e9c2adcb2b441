r"""Measure a trained base model and write the directory that ships with the package.

    python -m lookahead_jax.train.embedded.package --corpus CORPUS --run RUN \
        --out lookahead_jax/assets/base

The held-out code that the evaluation reads goes to eval/tasks/own/heldout_code.jsonl.
"""

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np
import tokenizers
import tyro

from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.checkpoints.load import load, save_params
from lookahead_jax.eval.intervals import of_share
from lookahead_jax.eval.tasks.own.code import HELDOUT
from lookahead_jax.eval.tasks.own.prompts import OWN_TASKS, Filler, text_lines
from lookahead_jax.eval.tasks.own.words import Words
from lookahead_jax.generation.generate import generate
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.files import atomic_write, make_folder
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.params import Params
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.train.embedded.base import read_params
from lookahead_jax.train.embedded.card import card
from lookahead_jax.train.embedded.corpus import open_tokenizer
from lookahead_jax.train.embedded.measure import evaluate, exact_match

# The model has no roles: a conversation is the concatenation of its messages.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
# None ends in a line break: the tokenizer joins a break with the indentation that follows it.
PROMPTS = (
    "import json\nimport os\n\n\ndef read_config(path):",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):",
    "def mean(values):\n    total = 0\n    for value in values:",
)
HELDOUT_CHARS = 12_000  # of each held-out file, so that a few long ones do not dominate


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackageConfig:
    """Measurements to make, and the folder to write."""

    corpus: pathlib.Path
    """Folder written by lookahead_jax.train.embedded.corpus."""
    run: pathlib.Path
    """Folder of a run of lookahead_jax.train.embedded.base."""
    out: pathlib.Path
    """Folder to write."""
    count: int = 200
    """New prompts per task."""
    seed: int = 2_000_000
    """Seed of the prompts; training uses other seeds."""
    lengths: tuple[int, ...] = (512, 1024, 2000)
    """Prompt lengths; above 512, a quarter of `count` prompts each."""


def interval(right: np.ndarray) -> str:
    """Share of successes with its 95 % Wilson interval, as a cell of a table."""
    low, high = of_share(float(right.mean()), len(right))
    return f"{right.mean():.3f} ({low:.3f}-{high:.3f})"


def accuracy_table(
    params: Params, model: ModelConfig, words: Words, valid: np.ndarray, config: PackageConfig
) -> list[str]:
    """Exact match of every task, with comment filler at every length and text filler at 512."""
    settings: list[tuple[int, str, Filler | None]]
    settings = [(n, "comments", None) for n in config.lengths]
    settings.insert(1, (512, "held-out code", text_lines(valid, words)))
    rows = [[f"{length} tokens, {name}" for length, name, _ in settings]]
    for task in OWN_TASKS:
        cells = []
        for length, _, filler in settings:
            right = exact_match(
                params,
                task,
                words,
                model=model,
                count=config.count if length <= 512 else config.count // 4,
                length=length,
                seed=config.seed,
                filler=filler,
            )
            cells.append(interval(right))
        print(task, cells, flush=True)
        rows.append(cells)
    lines = [
        f"| {name} | " + " | ".join(r) + " |"
        for name, r in zip(["task", *OWN_TASKS], rows, strict=True)
    ]
    return [lines[0], "|---" * (1 + len(settings)) + "|", *lines[1:]]


def text_figures(
    params: Params, model: ModelConfig, valid: np.ndarray, tokenizer: tokenizers.Tokenizer
) -> dict[str, float]:
    """Perplexity per token and bits per byte of the held-out text, in windows of 512 tokens."""
    rows = (len(valid) - 1) // 512
    tokens = np.stack([valid[i * 512 : i * 512 + 513] for i in range(rows)]).astype(np.int32)
    nll, right = evaluate(params, tokens, 1, model=model)
    written = sum(len(t.encode()) for t in tokenizer.decode_batch(tokens[:, 1:].tolist()))
    return {
        "tokens": nll.size,
        "perplexity": float(np.exp(nll.mean())),
        "bits_per_byte": float(nll.sum() / math.log(2) / written),
        "next_token_accuracy": float(right.mean()),
    }


def completions(out: pathlib.Path) -> list[str]:
    """Greedy continuations of a few prompts by the written model."""
    model, blocks = load(out), []
    for prompt in PROMPTS:
        result = generate(
            model, [prompt], policy=make_policy("full"), budget=2048, max_new_tokens=48
        )
        continued = result.text[0] if result.text else ""
        blocks.append(f"```python\n{prompt}{continued}\n```\n")
    return blocks


def write_files(config: PackageConfig, params: Params, hf: dict, model: ModelConfig) -> None:
    """Writes everything except the card."""
    save_params(config.out, params, model)
    (config.out / "model.safetensors").chmod(0o644)
    shutil.copy(config.corpus / "tokenizer.json", config.out / "tokenizer.json")
    ids = {k: hf[k] for k in ("bos_token_id", "eos_token_id")}
    contents = {
        "config.json": hf,
        "generation_config.json": {**ids, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": hf["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in contents.items():
        atomic_write(config.out / name, json.dumps(content, indent=1) + "\n")


def write_heldout(corpus: pathlib.Path) -> None:
    """The beginnings of the held-out files with their sources and licences, a JSON line each."""
    sources = json.loads((corpus / "manifest.json").read_text("utf-8"))["sources"]
    lines = []
    for line in (corpus / "valid.jsonl").read_text("utf-8").splitlines():
        file = json.loads(line)
        file["license"] = sources[file["source"]]["license"]
        file["text"] = file["text"][:HELDOUT_CHARS]
        lines.append(json.dumps(file))
    atomic_write(HELDOUT, "\n".join(lines) + "\n")


def package(config: PackageConfig) -> None:
    """Writes the model, its measurements and its card into the folder that ships."""
    make_folder(config.out)
    tokenizer = open_tokenizer(config.corpus)
    words = Words.of(tokenizer)
    valid = np.load(config.corpus / "valid.npy")
    hf = json.loads((config.run / "config.json").read_text("utf-8"))
    model = config_from_hf(hf)
    params = read_params(config.run, model)
    write_files(config, params, hf, model)
    write_heldout(config.corpus)
    figures = text_figures(params, model, valid, tokenizer)
    print(figures, flush=True)
    sections = {
        "figures": [f"- {k.replace('_', ' ')}: {v:,.4g}" for k, v in figures.items()],
        "completions": completions(config.out),
        "accuracy": accuracy_table(params, model, words, valid, config),
    }
    atomic_write(config.out / "README.md", card(config.corpus, config.run, sections))


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    prog = "python -m lookahead_jax.train.embedded.package"
    return run_command(lambda: tyro.cli(PackageConfig, args=args, prog=prog), package, prog=prog)


if __name__ == "__main__":
    end_process(main())
