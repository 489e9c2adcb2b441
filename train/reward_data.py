"""Labelled steps for a reward head, from problems whose answers are known.

    lookahead train reward-data --model DIR --source PROBLEMS.jsonl --out STEPS.jsonl
    lookahead train reward --model DIR --data STEPS.jsonl --run RUN

The model samples several solutions of each problem. All steps of one have the same label: whether
it ended in the right answer (outcome supervision, Cobbe et al. 2021, arXiv:2110.14168).
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from tqdm import tqdm

from lookahead_jax.checkpoints.load import load
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.integers import check_integer
from lookahead_jax.policies.full import Full
from lookahead_jax.strategies.search import search
from lookahead_jax.strategies.self_consistency import SelfConsistency, normal
from lookahead_jax.train.labelled_steps import encode_prompt, read_lines
from lookahead_jax.train.progress import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardDataConfig:
    """Sample solutions of problems, and label their steps by whether the answer was right."""

    model: Path
    """Folder of the model that the head is for, which samples the solutions."""
    source: Path
    """JSON lines with a problem's "prompt" and its "answer", as texts. Of an answer, too, the last
    match of the pattern counts, if there is one."""
    out: Path
    """JSON lines for `lookahead train reward`. It must not exist."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; None: that of the checkpoint."""
    chat: bool = False
    """The prompts are users' messages: apply the model's chat template."""
    n: int = 8
    """Solutions of each problem."""
    pattern: str = SelfConsistency.pattern
    """Regular expression of an answer. The last match in a solution counts, or its last group; by
    default a number. Commas and outer spaces do not matter."""
    step: str = "\n\n"
    """The string that ends a step."""
    max_new_tokens: int = 512
    """Longest solution in tokens. One that is cut is wrong unless it has the answer."""
    temperature: float = 0.8
    """Sampling temperature."""
    seed: int = 0
    """Seed of the samples; each problem draws its own."""

    def __post_init__(self) -> None:
        if not self.step:
            raise ValueError("step is empty: give the string that ends a step")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} draws no samples: give one above 0")
        check_integer("max_new_tokens", self.max_new_tokens, least=1)


class Problem(NamedTuple):
    """A problem with a known answer."""

    prompt: str
    answer: str


def write_steps(config: RewardDataConfig) -> None:
    """Writes the labelled steps, problem by problem; those of an interrupted run can be used.

    Raises ValueError for lines that are no problems, FileExistsError if `config.out` exists.
    """
    strategy = SelfConsistency(n=config.n, pattern=config.pattern)
    if config.out.exists():
        raise FileExistsError(f"{config.out} exists: give another --out, or remove it")
    problems = list(read_lines(config.source, _problem))
    say(f"loading {config.model}")
    model = load(config.model, dtype=config.dtype)
    right = 0
    with open(config.out, "x", encoding="utf-8") as file:
        for i, (prompt, answer) in enumerate(tqdm(problems, unit="problem")):
            known = strategy.answer(answer) or normal(answer)
            solutions = search(
                model, [encode_prompt(model, prompt, chat=config.chat)], strategy=strategy,
                policy=Full(), max_new_tokens=config.max_new_tokens,
                sampling=Sampling(temperature=config.temperature), seeds=[config.seed + i],
            ).candidates[0]  # fmt: skip
            for solution in solutions:
                text = solution.text or ""
                label = int(strategy.answer(text) == known)
                right += label
                if steps := split(text, config.step):
                    row = {"prompt": prompt, "steps": steps, "labels": [label] * len(steps)}
                    file.write(json.dumps(row) + "\n")
            file.flush()
    say(f"{config.out}: {right} of {config.n * len(problems)} solutions are right")


def split(text: str, end: str) -> list[str]:
    """The steps of a text, each up to the string `end`, which it includes."""
    return re.findall(f"(?s).*?{re.escape(end)}|.+$", text)


def _problem(row: Any) -> Problem:
    if not isinstance(row, dict) or not all(
        isinstance(row.get(name), str) and row[name].strip() for name in Problem._fields
    ):
        raise ValueError('expected {"prompt": a text, "answer": a text}')
    return Problem(row["prompt"], row["answer"])


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    prog = "lookahead train reward-data"
    return run_command(
        lambda: tyro.cli(RewardDataConfig, args=args, prog=prog), write_steps, prog=prog
    )


if __name__ == "__main__":
    end_process(main())
