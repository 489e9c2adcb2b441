"""The task families: rows to hide in a document, and questions about them with their answers.

Every row is a line of single-token words. A question is a line `>>> verb words :` after the
document. Answers name what they look up before its value, and values come right after their names:
both are what a small model learns quickly (the value follows the last time the name was seen).

    lookup   rows ` - name value`         `>>> find a b :`       ` a 1 b 2`
    records  rows ` - field value`        `>>> record graph :`   ` nodes 1 edges 2 ...`
    tagged   rows ` + tag before value`   `>>> tag color :`      ` color`, its values in order
    spans    rows ` [ tag v v v v ]`      `>>> copy color :`     ` color v v v v`
    chains   rows ` > a b`                `>>> trace a :`        ` a b c d e`
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lookahead_jax.eval.tasks.own.words import Words


class Facts(NamedTuple):
    """What one family contributes to a document."""

    rows: list[list[int]]  # token ids without the line break; their order in the document is kept
    questions: list[
        tuple[list[int], list[int]]
    ]  # (question, answer) from the line break on, answer ends in </s>


class Pool:
    """Words of one document: names are handed out once; values repeat only when they run out."""

    def __init__(self, rng: np.random.Generator, words: Words):
        self._names = rng.permutation(words.names).tolist()
        self._tags = rng.permutation(words.tags).tolist()
        self._values: list[int] = []
        self._rng, self._words = rng, words

    def names(self, count: int) -> list[int]:
        return self._take(self._names, count, "names")

    def tags(self, count: int) -> list[int]:
        return self._take(self._tags, count, "tags")

    def values(self, count: int) -> list[int]:
        while len(self._values) < count:
            self._values += self._rng.permutation(self._words.values).tolist()
        return self._take(self._values, count, "values")

    @staticmethod
    def _take(stock: list[int], count: int, kind: str) -> list[int]:
        if count > len(stock):
            raise ValueError(f"the document needs {count} more {kind}, and {len(stock)} are left")
        taken = stock[:count]
        del stock[:count]
        return taken


def question(
    words: Words, verb: str, arguments: list[int], answer: list[int]
) -> tuple[list[int], list[int]]:
    asked = [words.newline, words.symbols[">>>"], words.verbs[verb], *arguments, words.symbols[":"]]
    return asked, [*answer, words.eos]


def shuffled(rng: np.random.Generator, items: list) -> list:
    return [items[i] for i in rng.permutation(len(items))]


def lookup(
    rng: np.random.Generator, words: Words, pool: Pool, *, pairs: int, asked: int, questions: int
) -> Facts:
    """`pairs` rows; each question asks for `asked` of them."""
    table = dict(zip(pool.names(pairs), pool.values(pairs), strict=True))
    rows = [[words.symbols["-"], key, value] for key, value in table.items()]
    order = [
        rng.permutation(list(table)).tolist()
        for _ in range(-(-questions * asked // pairs) if pairs else 0)
    ]
    keys = [key for part in order for key in part][: questions * asked]
    groups = [keys[i : i + asked] for i in range(0, len(keys), asked)]
    return Facts(
        shuffled(rng, rows),
        [question(words, "find", g, [t for key in g for t in (key, table[key])]) for g in groups],
    )


def records(
    rng: np.random.Generator, words: Words, pool: Pool, *, schemas: int, questions: int
) -> Facts:
    """All fields of `schemas` schemas; each question names a schema and none of its fields."""
    chosen = [words.schemas[i] for i in rng.permutation(len(words.schemas))[:schemas]]
    rows, asked = [], []
    for name, fields in chosen:
        values = pool.values(len(fields))
        rows += [[words.symbols["-"], field, v] for field, v in zip(fields, values, strict=True)]
        answer = [t for pair in zip(fields, values, strict=True) for t in pair]
        asked.append(question(words, "record", [name], answer))
    return Facts(shuffled(rng, rows), shuffled(rng, asked)[:questions])


def tagged(
    rng: np.random.Generator, words: Words, pool: Pool, *, tags: int, per_tag: int, questions: int
) -> Facts:
    """`per_tag` rows for each of `tags` tags, mixed; the answer keeps the order of the document.

    Every row names the value before it under its tag, the first one the tag itself. Without that
    the order is a matter of positions alone, which a model of a few layers does not learn.
    """
    names = pool.tags(tags)
    values = {tag: [tag, *pool.values(per_tag)] for tag in names}
    order = shuffled(rng, [tag for tag in names for _ in range(per_tag)])
    links = {tag: pairwise(values[tag]) for tag in names}
    rows = [[words.symbols["+"], tag, *next(links[tag])] for tag in order]
    asked = [question(words, "tag", [tag], values[tag]) for tag in shuffled(rng, names)]
    return Facts(rows, asked[:questions])


def spans(
    rng: np.random.Generator, words: Words, pool: Pool, *, spans: int, span: int, questions: int
) -> Facts:
    """`spans` marked spans of `span` words each."""
    marked = [(tag, pool.values(span)) for tag in pool.tags(spans)]
    rows = [[words.symbols["["], tag, *body, words.symbols["]"]] for tag, body in marked]
    asked = [question(words, "copy", [tag], [tag, *body]) for tag, body in shuffled(rng, marked)]
    return Facts(rows, asked[:questions])


def chains(
    rng: np.random.Generator, words: Words, pool: Pool, *, chains: int, hops: int, questions: int
) -> Facts:
    """`chains` chains of `hops` links with no common node; the asked one is hidden among them."""
    nodes = [pool.names(hops + 1) for _ in range(chains)]
    rows = [[words.symbols[">"], a, b] for c in nodes for a, b in pairwise(c)]
    asked = [question(words, "trace", c[:1], c) for c in shuffled(rng, nodes)]
    return Facts(shuffled(rng, rows), asked[:questions])


FAMILIES: dict[str, Callable[..., Facts]] = {
    "lookup": lookup,
    "records": records,
    "tagged": tagged,
    "spans": spans,
    "chains": chains,
}
