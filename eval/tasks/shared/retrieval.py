"""Retrieval after SCBench (arXiv 2412.10319): a key, a string by its ends, a chain of variables.

SCBench asks several questions of one context, because a cache that was cut for one question may
lack what the next one needs. The formats follow its Retr.KV, Retr.Prefix-Suffix and Retr.MultiHop;
sizes and wording are our own, for small models too. Scores are no SCBench results.
"""

import json
import random
import string
import uuid
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from lookahead_jax.eval.tasks.base import Example, Source
from lookahead_jax.eval.tasks.ruler import NOISE
from lookahead_jax.eval.tasks.ruler_material import substitute
from lookahead_jax.eval.tasks.shared.fitting import fitted

QUESTIONS = 4  # asked of one cut context
LEAST = 3 * QUESTIONS  # units that hold a line for every question and two like it


class Asked(NamedTuple):
    """One question about a context."""

    question: str
    prefix: str
    answers: list[str]


Retrieval = Callable[[random.Random, int, int], tuple[str, list[Asked]]]
"""(rng, units of material, questions) -> a context and questions about it."""


def distinct(count: int, draw: Callable[[], str]) -> list[str]:
    """`count` different values of `draw`, in the order in which they came."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def _names(rng: random.Random, count: int) -> list[str]:
    """Different names of two words, or of three where so many are needed."""
    words = substitute().words
    size = 2 if count < len(words) ** 2 // 4 else 3
    return distinct(count, lambda: "-".join(rng.choices(words, k=size)))


def kv(rng: random.Random, units: int, asked: int, *, uuids: bool) -> tuple[str, list[Asked]]:
    """A JSON object with so many keys, and some of them to be looked up."""

    def drawn() -> str:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    keys = distinct(units, drawn) if uuids else _names(rng, units)
    pairs = {key: drawn() if uuids else str(rng.randint(1000, 9999)) for key in keys}
    context = (
        "Below is a JSON object. I will ask you for the values of some of its keys.\n\n"
        + json.dumps(pairs)
    )
    return context, [
        Asked(f'\n\nWhich value has the key "{key}"?', f'"{key}": "', [pairs[key]])
        for key in rng.sample(keys, asked)
    ]


def prefix_suffix(rng: random.Random, units: int, asked: int) -> tuple[str, list[Asked]]:
    """Lines of four words; a line is found by its first two words and its last.

    For every line that is asked for, one other begins like it and one other ends like it. The
    answer begins with the given words, and the rest is to be found.
    """
    words = substitute().words
    lines: dict[tuple[str, str], str] = {}  # (first two words, last word) -> the word between

    def add(first: str | None = None, last: str | None = None) -> tuple[str, str]:
        """A new line, with these ends where they are given."""
        while True:
            ends = first or "-".join(rng.choices(words, k=2)), last or rng.choice(words)
            if ends not in lines:
                lines[ends] = rng.choice(words)
                return ends

    wanted = [add() for _ in range(asked)]
    for first, last in wanted:
        add(first=first)
        add(last=last)
    while len(lines) < units:
        add()
    shuffled = [f"{first}-{word}-{last}" for (first, last), word in lines.items()]
    rng.shuffle(shuffled)
    context = "Below is a list of strings. I will ask you for some of them.\n\n" + "\n".join(
        shuffled
    )
    return context, [
        Asked(
            f'\n\nWhich string begins with "{first}" and ends with "{last}"?',
            f'The string is "{first}-',
            [f"{lines[first, last]}-{last}"],
        )
        for first, last in wanted
    ]


def hops(rng: random.Random, units: int, asked: int, *, hops: int) -> tuple[str, list[Asked]]:
    """Chains of assignments in noise; all variables that have a value are asked for."""
    chains = max(asked, 2)
    names = distinct(chains * (hops + 1), lambda: "".join(rng.choices(string.ascii_uppercase, k=4)))
    values = distinct(chains, lambda: str(rng.randint(10000, 99999)))
    groups = [names[i : i + hops + 1] for i in range(0, len(names), hops + 1)]
    lines: list[str] = [NOISE] * units
    places = [sorted(rng.choices(range(units + 1), k=hops + 1)) for _ in groups]
    said = []
    for group, value, at in zip(groups, values, places, strict=True):
        statements = [f"VAR {group[0]} = {value}"]
        statements += [f"VAR {b} = VAR {a}" for a, b in pairwise(group)]
        said += list(zip(at, statements, strict=True))
    for at, statement in sorted(reversed(said), key=lambda pair: -pair[0]):
        lines.insert(at, statement)
    context = (
        "Memorize and track the chains of variable assignments that are hidden in the following "
        "text.\n\n" + "\n".join(lines)
    )
    picked = rng.sample(range(chains), asked)
    return context, [
        Asked(
            f"\n\nQuestion: Which variables are assigned the value {values[i]} in the text above, "
            "directly or through another variable?",
            f"Answer: {hops + 1} variables are assigned the value {values[i]}: VAR",
            groups[i],
        )
        for i in picked
    ]


def make(retrieval: Retrieval, answer: int, many: bool, source: Source) -> list[Example]:
    """`source.count` examples: one of each context, or `QUESTIONS` that share theirs.

    An answer may have `answer` tokens. With `many` the number is rounded down to whole contexts.
    Raises ValueError for fewer examples than one context has.
    """
    asked = QUESTIONS if many else 1
    if source.count < asked:
        raise ValueError(
            f"--count {source.count}: this task asks {asked} questions of each context, so give at "
            f"least {asked}"
        )

    def build(rng: random.Random, units: int) -> list[Example]:
        context, questions = retrieval(rng, units, asked)
        return [
            Example(
                id="", context=context, question=one.question, prefix=one.prefix,
                answers=tuple(one.answers), max_new_tokens=answer, group="shared" if many else "",
            )
            for one in questions
        ]  # fmt: skip

    return fitted(source, build, contexts=source.count // asked, least=LEAST)


def looked_up(prediction: str, answers: Sequence[str]) -> float:
    """Whether the answer is the value in whose quotation marks the prediction begins.

    The JSON goes on behind it, and another of its values may be the right one.
    """
    return float(prediction.partition('"')[0].strip() == answers[0])


def found(prediction: str, answers: Sequence[str]) -> float:
    """Whether the prediction contains the answer (SCBench's score of retrieval)."""
    return float(answers[0] in prediction)
