"""Chains of additions and subtractions, and count-down puzzles.

Both show solved problems as earlier turns of the dialogue. The prompt of a count-down puzzle says
whether an answer is right; that of a chain does not.
"""

import itertools
from collections.abc import Callable

import numpy as np

from lookahead_jax.eval.scorers.numbers import arithmetic, reaches, same_number
from lookahead_jax.eval.tasks.base import Example, Source

STEPS = 2  # of a chain
NUMBERS = 3  # of a puzzle
SHOTS = 3
_MISSES = 1000  # draws in a row that give no new problem: there are hardly any left
_WORDS = {"+": "Add", "-": "Subtract"}


def _chain(rng: np.random.Generator) -> tuple[str, str]:
    """A problem, and its solution: a line for each step, and the answer."""
    value = int(rng.integers(2, 10))
    asked, lines = [f"Start with {value}."], []
    while len(lines) < STEPS:
        sign, number = str(rng.choice(list(_WORDS))), int(rng.integers(1, 10))
        after = value + number if sign == "+" else value - number
        if after > 0:
            asked.append(f"{_WORDS[sign]} {number}.")
            lines.append(f"{value} {sign} {number} = {after}")
            value = after
    question = f"{' '.join(asked)} What is the result?"
    return question, "\n".join([*lines, f"The answer is {value}."])


def _countdown(rng: np.random.Generator) -> tuple[str, str]:
    """A puzzle, and one of its solutions."""
    while True:
        numbers = rng.choice(np.arange(1, 10), NUMBERS, replace=False).tolist()
        signs = rng.choice([1, -1], NUMBERS - 1).tolist()
        target = numbers[0] + sum(a * b for a, b in zip(signs, numbers[1:], strict=True))
        if target > 0:
            break
    shown = ", ".join(map(str, numbers))
    later = zip(signs, numbers[1:], strict=True)
    term = " ".join([str(numbers[0]), *(f"{'+' if a > 0 else '-'} {b}" for a, b in later)])
    return (
        f"Use each of the numbers {shown} once, with + or -, to make {target}.",
        f"{term} = {target}",
    )


def _examples(make: Callable[[np.random.Generator], tuple[str, str]], source: Source):
    """Up to `source.count` different problems, with the same solved ones before each.

    There are about 1,400 of each kind.
    """
    found: dict[str, str] = {}
    misses = 0  # in a row
    for i in itertools.count():
        question, solution = make(np.random.default_rng((source.seed, i)))
        misses = misses + 1 if question in found else 0
        found.setdefault(question, solution)
        if len(found) == SHOTS + source.count or misses == _MISSES:
            break
    problems = list(found.items())
    return tuple(problems[:SHOTS]), problems[SHOTS:]


def chains(source: Source) -> list[Example]:
    """Chains, whose answers are numbers."""
    turns, problems = _examples(_chain, source)
    return [
        Example(
            id=str(i), context="", question=question, turns=turns, stop=("\n\n",),
            answers=(solution.rpartition(" ")[2].rstrip("."),), max_new_tokens=64,
        )
        for i, (question, solution) in enumerate(problems)
    ]  # fmt: skip


def countdown(source: Source) -> list[Example]:
    """Puzzles; an answer is one solution of possibly several."""
    turns, problems = _examples(_countdown, source)
    found = []
    for i, (question, solution) in enumerate(problems):
        term, _, target = solution.partition(" = ")
        read = arithmetic(term)
        numbers = [] if read is None else read[1]
        found.append(
            Example(
                id=str(i), context="", question=question, turns=turns, stop=("\n",),
                answers=(solution,), max_new_tokens=48,
                extra={"numbers": numbers, "target": int(target)},
            )
        )  # fmt: skip
    return found


def chain_score(prediction: str, example: Example) -> float:
    """Whether the last number is the answer."""
    return same_number(prediction, example.answers[0])


def countdown_score(prediction: str, example: Example) -> float:
    """Whether the term solves the puzzle; nothing but the puzzle is needed for it."""
    return reaches(prediction, example.extra["numbers"], example.extra["target"])
