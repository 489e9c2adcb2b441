"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168), in its published file; the answer's last number."""

import itertools
from typing import Any

from lookahead_jax.eval.scorers.numbers import same_number
from lookahead_jax.eval.tasks.base import Example, Source, field, rows_of

FILE = "gsm8k/test.jsonl"
_ASK = "\nSolve this step by step. End with: The answer is NUMBER."


def _steps(row: dict[str, Any]) -> int:
    """Calculations in the published solution; one without any counts as the longest."""
    return row["answer"].count("<<") or len(row["answer"])


def gsm8k(easiest: bool, source: Source) -> list[Example]:
    """The first problems of the file, or those whose published solution has the fewest steps."""
    path = source.file(FILE)
    rows = []
    for number, row in enumerate(rows_of(path)):
        answer = str(field(row, "answer", path))
        if "####" not in answer:
            raise ValueError(f"{path}: problem {number} has no answer after ####")
        rows.append((number, {"question": str(field(row, "question", path)), "answer": answer}))
    if easiest:
        rows.sort(key=lambda numbered: _steps(numbered[1]))
    return [
        Example(
            id=str(number), context=row["question"], question=_ASK,
            answers=(row["answer"].rpartition("####")[2].strip(),), max_new_tokens=160,
        )
        for number, row in itertools.islice(rows, source.count)
    ]  # fmt: skip


def gsm8k_score(prediction: str, example: Example) -> float:
    """Whether the last number is the answer."""
    return same_number(prediction, example.answers[0])
