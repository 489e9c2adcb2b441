"""A task: its examples, and the score of an answer.

An example keeps its context and its question apart for the two protocols: the model compresses
either both of them or the context alone.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lookahead_jax.checkpoints.tokenizer import Tokenizer

Cut = Literal["halves", "joined"]
"""How a prompt that is too long loses its middle: see `truncate` in eval/grid/prompts.py."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt and its expected answers.

    `context` and `question` are texts, or token ids (those of `context` start with BOS). The
    prompt is context + question + prefix; a chat template, where there is one and `chat` allows
    it, goes around the first two, and the prefix begins the model's answer.

    Examples of one `group` have the same context and follow one another: it is read and cut once,
    and every question is asked of a copy of that cache. They have the protocol `hidden` only, and
    all groups of a task are equally large.
    """

    id: str
    context: str | tuple[int, ...]
    question: str | tuple[int, ...]  # empty: no hidden protocol
    prefix: str = ""
    answers: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()  # earlier turns of a dialogue: (user, model)
    max_new_tokens: int
    chat: bool = True
    cut: Cut = "halves"
    stop: tuple[str, ...] = ()
    group: str = ""
    pin: str = ""  # a part of the context that every policy keeps, whatever its score
    extra: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # for the scorer and the report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The inputs that a task makes its examples from."""

    tokenizer: Tokenizer
    length: int  # tokens of a prompt, at most
    count: int  # examples, at most
    seed: int
    data: Path | None  # folder of the benchmarks' files

    def file(self, *names: str) -> Path:
        """The first of `names` that the data folder holds.

        Raises FileNotFoundError, naming the files, if there is none.
        """
        found = [self.data / name for name in names] if self.data is not None else []
        for path in found:
            if path.is_file():
                return path
        where = f"in {self.data}" if self.data is not None else "(no --data folder was given)"
        raise FileNotFoundError(f"{' or '.join(names)} not found {where}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark task.

    `score(prediction, example)` is in [0, 1]; None where a judge would be needed. A benchmark with
    several measures returns them by name, the one it is known by first. `binary` scores are 0 or
    1, so that shares of them have Wilson intervals. `reward(prediction, example)` in [0, 1] is for
    strategies that compare continuations, as far as they have come; it may use what the prompt
    says, and never the answer. `executes` tasks run what the model wrote: only with --allow-exec.
    `follow(example, prediction)` is the next turn of a dialogue, if any.
    """

    name: str
    make: Callable[[Source], list[Example]]
    score: Callable[[str, Example], float | Mapping[str, float]] | None
    binary: bool = False
    reward: Callable[[str, Example], float] | None = None
    executes: bool = False
    follow: Callable[[Example, str], Example | None] | None = None


def scored(task: Task, text: str, example: Example) -> tuple[float | None, dict[str, float]]:
    """The score of an answer, and the benchmark's other measures."""
    if task.score is None:
        return None, {}
    found = task.score(text, example)
    if not isinstance(found, Mapping):
        return found, {}
    measures = dict(found)
    return measures.pop(next(iter(measures))), measures


def rows_of(path: Path, count: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, or of a .json file that holds a list of them.

    Raises ValueError naming file and line for anything else.
    """
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, list):
            raise ValueError(f"{path}: expected a list of objects")
        yield from content[:count]
        return
    found = 0
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if found == count:
                return
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
                found += 1


def field(row: Mapping[str, Any], name: str, path: Path) -> Any:
    """`row[name]`; ValueError naming the file if it is missing."""
    if name not in row:
        raise ValueError(f"{path}: an object has no field {name!r}; it has {', '.join(row)}")
    return row[name]


def largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest n for which `fits(n)`, found by doubling and halving; 0 if none does."""
    low, high = 0, max(start, 1)
    while fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def listed(values: Sequence[str]) -> str:
    """ "a", "a, and b", "a, b, and c"."""
    return values[0] if len(values) == 1 else ", ".join(values[:-1]) + ", and " + values[-1]
