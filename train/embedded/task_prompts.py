r"""Write prompts for training the embedded model's lookahead modules: documents of tasks, and code.

    python -m lookahead_jax.train.embedded.task_prompts --corpus CORPUS --out FILE \
        --tasks records tagged

FILE receives JSON lines with `task` and `prompt` (token ids). `lookahead train data` adds the
model's own responses. Difficulty, length and filler vary; seeds and code differ from those of the
evaluation.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tyro

from lookahead_jax.eval.tasks.own.code import CODE
from lookahead_jax.eval.tasks.own.prompts import OWN_TASKS, comments, make_example, text_lines
from lookahead_jax.eval.tasks.own.words import Words
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.files import atomic_write, check_output
from lookahead_jax.train.embedded.corpus import open_tokenizer

SHORTEST = 160  # tokens of the shortest prompts; the tasks' knobs below fit into them


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Kinds and number of the prompts."""

    corpus: pathlib.Path
    """Folder written by lookahead_jax.train.embedded.corpus."""
    out: pathlib.Path
    """JSON lines file to write."""
    tasks: tuple[str, ...] = (*OWN_TASKS, CODE)
    """Tasks, used in turn."""
    count: int = 2048
    """Number of prompts, over all tasks."""
    longest: int = 512
    """Tokens of the longest prompts; lengths are distributed evenly up to it."""
    seed: int = 4_000_000
    """Seed; each prompt derives its own from it."""


def random_knobs(rng: np.random.Generator, task: str, length: int) -> dict[str, Any]:
    """Random difficulty of one prompt, whose rows fill at most 80 % of it."""

    def rows(tokens: int, most: int, least: int) -> int:
        fit = max(least, int(0.8 * length) // tokens)
        return int(rng.integers(least, min(most, fit) + 1))

    match task:
        case "lookup":
            return {"pairs": rows(4, 64, 8)}
        case "multi_lookup":
            return {"pairs": rows(4, 64, 8), "asked": int(rng.integers(2, 7))}
        case "records":
            return {"schemas": rows(24, 8, 2)}
        case "tagged":
            per_tag = int(rng.integers(3, 8))
            return {"tags": rows(5 * per_tag, 8, 2), "per_tag": per_tag}
        case "spans":
            span = int(rng.integers(4, 14))
            return {"spans": rows(span + 4, 6, 2), "span": span}
        case "chains":
            hops = int(rng.integers(2, 6))
            return {"chains": rows(4 * hops, 16, 2), "hops": hops}
    raise ValueError(f"no knobs for task {task!r}")


def prompt(
    task: str, number: int, words: Words, stream: np.ndarray, config: PromptsConfig
) -> list[int]:
    """The prompt with this number: a function of the number and the seed."""
    rng = np.random.default_rng((config.seed, number))
    length = int(rng.integers(SHORTEST, config.longest + 1))
    if task == CODE:
        start = int(rng.integers(0, len(stream) - length))
        return [words.bos, *stream[start + 1 : start + length].tolist()]
    filler = text_lines(stream, words) if rng.random() < 0.5 else comments(words)
    knobs = random_knobs(rng, task, length)
    seed = (config.seed, number)
    return make_example(
        task, words, seed=seed, length=length, filler=filler, **knobs
    ).prompt.tolist()


def write_prompts(config: PromptsConfig) -> None:
    """Writes the prompts as JSON lines."""
    check_output(config.out)
    tokenizer = open_tokenizer(config.corpus)
    words, stream = Words.of(tokenizer), np.load(config.corpus / "train.npy")
    lines = []
    for number in range(config.count):
        task = config.tasks[number % len(config.tasks)]
        ids = prompt(task, number, words, stream, config)
        lines.append(json.dumps({"task": task, "prompt": ids}))
    atomic_write(config.out, "\n".join(lines) + "\n")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    prog = "python -m lookahead_jax.train.embedded.task_prompts"
    return run_command(
        lambda: tyro.cli(PromptsConfig, args=args, prog=prog), write_prompts, prog=prog
    )


if __name__ == "__main__":
    end_process(main())
