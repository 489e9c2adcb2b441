"""Documents that hide the rows of task families, and prompts of an exact length made of them."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from lookahead_jax.eval.tasks.own.families import FAMILIES, Facts, Pool
from lookahead_jax.eval.tasks.own.words import Words

OWN_TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "lookup": ("lookup", {"pairs": 48, "asked": 1}),
    "multi_lookup": ("lookup", {"pairs": 48, "asked": 4}),
    "records": ("records", {"schemas": 8}),
    "tagged": ("tagged", {"tags": 6, "per_tag": 6}),
    "spans": ("spans", {"spans": 4, "span": 12}),
    "chains": ("chains", {"chains": 14, "hops": 4}),
}
"""Task name -> (family, knobs at 512 tokens)."""


class TokenPrompt(NamedTuple):
    """One prompt with its only right answer, as token ids."""

    prompt: np.ndarray  # [T] int32
    answer: np.ndarray  # [Y] int32, ends in </s>


Filler = Callable[[np.random.Generator, int], list[list[int]]]
"""(rng, tokens) -> lines, each from its line break on, of exactly `tokens` tokens together."""


def comments(words: Words) -> Filler:
    """Filler lines ` # which but into` of random words that no task asks for."""

    def lines(rng: np.random.Generator, tokens: int) -> list[list[int]]:
        out = []
        while tokens > 0:
            size = tokens if tokens <= 9 else min(int(rng.integers(4, 10)), tokens - 2)
            body = rng.choice(words.filler, max(0, size - 2)).tolist()
            out.append([words.newline, words.symbols["#"], *body][:size])
            tokens -= size
        return out

    return lines


def text_lines(stream: np.ndarray, words: Words) -> Filler:
    """Filler cut from real text, a stream of token ids: the rows stand between its lines."""
    breaks = np.array(words.breaks)

    def lines(rng: np.random.Generator, tokens: int) -> list[list[int]]:
        start = int(rng.integers(0, max(1, len(stream) - tokens)))
        body = np.resize(stream[start : start + tokens], tokens).astype(np.int64)
        body[(body == words.bos) | (body == words.eos)] = words.newline
        body[:1] = words.newline
        cuts = [*np.flatnonzero(np.isin(body, breaks)).tolist(), tokens]
        return [body[a:b].tolist() for a, b in pairwise(cuts)]

    return lines


def interleave(rng: np.random.Generator, groups: Sequence[list[list[int]]]) -> list[list[int]]:
    """All rows in random order, the order within each group kept."""
    order = rng.permutation([i for i, group in enumerate(groups) for _ in group])
    heads = [iter(group) for group in groups]
    return [next(heads[i]) for i in order]


def document(
    rng: np.random.Generator, words: Words, facts: Sequence[Facts], *, length: int, filler: Filler
) -> list[int]:
    """<s> and all rows, each after a line break, among filler: exactly `length` tokens.

    Raises:
      ValueError: the rows alone are longer.
    """
    used = 1 + sum(len(row) + 1 for f in facts for row in f.rows)
    if used > length:
        raise ValueError(f"the rows take {used} tokens, the document has room for {length}")
    groups = [[[words.newline, *row] for row in f.rows] for f in facts]
    lines = interleave(rng, [*groups, filler(rng, length - used)])
    return [words.bos, *(t for line in lines for t in line)]


def make_example(
    task: str,
    words: Words,
    *,
    seed: int | Sequence[int],
    length: int,
    filler: Filler | None = None,
    **knobs: Any,
) -> TokenPrompt:
    """A fresh prompt of exactly `length` tokens, question included; the same for the same seed.

    `knobs` override those of OWN_TASKS (number of rows, of distractors, of keys asked for).

    Raises:
      ValueError: an unknown task, or rows that do not fit into `length`.
    """
    if task not in OWN_TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(OWN_TASKS)}")
    family, defaults = OWN_TASKS[task]
    rng = np.random.default_rng(seed)
    facts = FAMILIES[family](rng, words, Pool(rng, words), questions=1, **(defaults | knobs))
    asked, answer = facts.questions[0]
    text = document(
        rng, words, [facts], length=length - len(asked), filler=filler or comments(words)
    )
    return TokenPrompt(np.array(text + asked, np.int32), np.array(answer, np.int32))


def make_batch(
    task: str,
    words: Words,
    *,
    count: int,
    seed: int,
    length: int,
    filler: Filler | None = None,
    **knobs: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """`count` examples: prompts [count, length], answers [count, Y] int32 padded with -1."""
    examples = [
        make_example(task, words, seed=(seed, i), length=length, filler=filler, **knobs)
        for i in range(count)
    ]
    answers = np.full((count, max(len(e.answer) for e in examples)), -1, np.int32)
    for row, example in zip(answers, examples, strict=True):
        row[: len(example.answer)] = example.answer
    return np.stack([e.prompt for e in examples]), answers
