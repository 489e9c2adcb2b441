"""Training rows of the embedded model: real text, and documents followed by questions on them."""

from typing import Any, NamedTuple

import numpy as np

from lookahead_jax.eval.tasks.own.families import FAMILIES, Facts, Pool
from lookahead_jax.eval.tasks.own.prompts import comments, document, text_lines
from lookahead_jax.eval.tasks.own.words import Words


class TrainingRows(NamedTuple):
    """Token rows and the places where the next token is learned; NumPy arrays, traced in a step."""

    tokens: Any  # [rows, T + 1] int32
    positions: Any  # [rows, T] int32, ascending
    picks: Any  # [rows, Q] int32 indices in 0..T-1
    weights: Any  # [rows, Q] float32, 0 = padding


def stretched_positions(
    rng: np.random.Generator, *, rows: int, length: int, reach: int, share: float
) -> np.ndarray:
    """Positions 0..T-1; in a `share` of the rows a few random gaps spread them up to `reach`.

    So distances of longer prompts are learned at the cost of short ones (PoSE, arXiv 2309.10400).
    """
    gaps = np.zeros((rows, length), np.int64)
    for i in np.flatnonzero(rng.random(rows) < share):
        count = int(rng.integers(1, 4))
        total = int(rng.integers(0, max(1, reach - length)))
        sizes = rng.multinomial(total, rng.dirichlet(np.ones(count)))
        np.add.at(gaps[i], rng.integers(1, length, count), sizes)
    return (np.arange(length) + gaps.cumsum(axis=1)).astype(np.int32)


def text_rows(
    rng: np.random.Generator, stream: np.ndarray, *, rows: int, length: int
) -> TrainingRows:
    """Random windows of the text; every token is learned."""
    starts = rng.integers(0, len(stream) - length - 1, rows)
    tokens = stream[starts[:, None] + np.arange(length + 1)].astype(np.int32)
    picks = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return TrainingRows(tokens, picks, picks, np.ones((rows, length), np.float32))


def _knobs(rng: np.random.Generator, family: str, room: int) -> dict[str, Any]:
    """Random difficulty of one family whose rows take about `room` tokens or less."""
    rows = max(2, room // 4)
    match family:
        case "lookup":
            pairs = int(rng.integers(2, min(rows, 100) + 1))
            return {
                "pairs": pairs,
                "asked": int(rng.integers(1, min(6, pairs) + 1)),
                "questions": 6,
            }
        case "records":
            return {"schemas": int(rng.integers(1, min(8, max(1, rows // 6)) + 1)), "questions": 6}
        case "tagged":
            tags = int(rng.integers(1, min(8, max(1, rows // 4)) + 1))
            return {
                "tags": tags,
                "per_tag": int(rng.integers(2, min(8, max(2, rows // tags)) + 1)),
                "questions": 4,
            }
        case "spans":
            count = int(rng.integers(1, min(4, max(1, rows // 4)) + 1))
            return {
                "spans": count,
                "span": int(rng.integers(3, min(14, max(3, room // count - 4)) + 1)),
                "questions": 4,
            }
        case "chains":
            count = int(rng.integers(1, min(16, max(1, rows // 4)) + 1))
            return {
                "chains": count,
                "hops": int(rng.integers(2, min(5, max(2, rows // count)) + 1)),
                "questions": 5,
            }
    raise ValueError(f"no knobs for family {family!r}")


def _cost(facts: Facts) -> int:
    return sum(len(row) + 1 for row in facts.rows)


def task_row(
    rng: np.random.Generator,
    words: Words,
    stream: np.ndarray,
    *,
    length: int,
    fill: float,
) -> tuple[list[int], list[int]]:
    """`length + 1` tokens, a document and questions, and the indices of the answers' tokens."""
    pool, facts, room = Pool(rng, words), [], int(length * rng.uniform(0.35, fill)) - 1
    for family in rng.permutation(tuple(FAMILIES))[: 1 + int(rng.integers(0, 3))]:
        drawn = FAMILIES[family](rng, words, pool, **_knobs(rng, str(family), room * 2 // 3))
        if _cost(drawn) <= room:
            facts.append(drawn)
            room -= _cost(drawn)
    questions = [q for f in facts for q in f.questions]
    asked, total = [], 0
    for i in rng.permutation(len(questions)):
        size = len(questions[i][0]) + len(questions[i][1])
        if 1 + sum(map(_cost, facts)) + total + size <= length + 1:
            asked.append(questions[i])
            total += size
    filler = text_lines(stream, words) if rng.random() < 0.5 else comments(words)
    tokens = document(rng, words, facts, length=length + 1 - total, filler=filler)
    answers = []
    for question, answer in asked:
        tokens += question
        answers += range(len(tokens), len(tokens) + len(answer))
        tokens += answer
    return tokens, answers


def repeat_row(
    rng: np.random.Generator, words: Words, stream: np.ndarray, *, length: int
) -> tuple[list[int], list[int]]:
    """`length + 1` tokens that repeat pieces of themselves, and the indices of the copies.

    The pieces are real text or random words. Their lengths and distances vary: were they fixed, a
    model would learn to copy by distance and not by content.
    """
    real = rng.random() < 0.5
    tokens, copied, pieces = [words.bos], [], []
    while len(tokens) <= length:
        if pieces and rng.random() < 0.6:
            piece = pieces[int(rng.integers(len(pieces)))]
            # What begins a copy cannot be foreseen.
            copied += range(len(tokens) + 1, len(tokens) + len(piece))
        else:
            size = int(rng.integers(4, max(6, length // 5)))
            start = int(rng.integers(0, len(stream) - size))
            some = rng.choice(words.names + words.values, size)
            piece = (stream[start : start + size] if real else some).tolist()
            pieces.append(piece)
        tokens += piece
    return tokens[: length + 1], [i for i in copied if i <= length]


def task_rows(
    rng: np.random.Generator,
    words: Words,
    stream: np.ndarray,
    *,
    rows: int,
    length: int,
    repeats: float = 0.0,
    fill: float = 0.8,
) -> TrainingRows:
    """Fresh documents with questions; only answers are learned, at most T / 2 tokens of a row.

    A share `repeats` of the rows are copies instead; documents take 0.35 to `fill` of their row.
    """
    width = length // 2
    tokens = np.zeros((rows, length + 1), np.int32)
    picks, weights = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.float32)
    for i in range(rows):
        if i < round(rows * repeats):
            tokens[i], answers = repeat_row(rng, words, stream, length=length)
        else:
            tokens[i], answers = task_row(rng, words, stream, length=length, fill=fill)
        answers = answers[-width:]
        picks[i, : len(answers)] = np.array(answers, np.int32) - 1
        weights[i, : len(answers)] = 1.0
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return TrainingRows(tokens, positions, picks, weights)
