"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168), in its published file; the answer's last number.

Three problems of our own are solved before each, as earlier turns of the dialogue.
"""

import itertools
import re
import sys
from typing import Any

from lookahead_jax.eval.scorers.numbers import same_number
from lookahead_jax.eval.tasks.base import Example, Source, field, rows_of

FILE = "gsm8k/test.jsonl"
_SHOTS = (
    (
        "Tom has 3 bags with 4 apples each. He eats 2 of the apples. How many apples are left?",
        "The bags hold 3 * 4 = 12 apples.\n12 - 2 = 10 apples are left.\nThe answer is 10.",
    ),
    (
        "A pen costs $2 and a notebook costs $5. How much do 4 pens and one notebook cost?",
        "The pens cost 4 * 2 = 8 dollars.\nAll together cost 8 + 5 = 13 dollars.\n"
        "The answer is 13.",
    ),
    (
        "Anna reads 30 pages a day. Her book has 150 pages. How many days does it take her?",
        "It takes 150 / 30 = 5 days.\nThe answer is 5.",
    ),
)


def _effort(row: dict[str, Any]) -> tuple[int, int]:
    """Calculations in the published solution, and operators in them; not shown is not easy."""
    terms = re.findall(r"<<(.*?)=", row["answer"])
    operators = len(re.findall(r"[-+*/]", "".join(terms)))
    return len(terms) or sys.maxsize, operators or sys.maxsize


def gsm8k(easiest: bool, source: Source) -> list[Example]:
    """The first problems of the file, or those whose published solution takes the least effort."""
    path = source.file(FILE)
    rows = []
    for number, row in enumerate(rows_of(path)):
        answer = str(field(row, "answer", path))
        if "####" not in answer:
            raise ValueError(f"{path}: problem {number} has no answer after ####")
        rows.append((number, {"question": str(field(row, "question", path)), "answer": answer}))
    if easiest:
        rows.sort(key=lambda numbered: _effort(numbered[1]))
    return [
        Example(
            id=str(number), context="", question=row["question"], turns=_SHOTS, stop=("\n\n",),
            answers=(row["answer"].rpartition("####")[2].strip(),), max_new_tokens=96,
        )
        for number, row in itertools.islice(rows, source.count)
    ]  # fmt: skip


def gsm8k_score(prediction: str, example: Example) -> float:
    """Whether the last number is the answer."""
    return same_number(prediction, example.answers[0])
