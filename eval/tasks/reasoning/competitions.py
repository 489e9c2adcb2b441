r"""MATH-500 and AIME 2024, in their published files; exact answers in \boxed{}.

MATH-500 are the 500 problems of MATH (Hendrycks et al. 2021, arXiv:2103.03874) that Lightman et
al. 2023 (arXiv:2305.20050) test on. Both tasks ask without an example, in the words that
evaluations of reasoning models use. A problem and its instruction are one prompt, so there are no
hidden rows.
"""

from typing import NamedTuple

from lookahead_jax.eval.scorers.mathematics import require_sympy, same_answer
from lookahead_jax.eval.tasks.base import Example, Source, field, rows_of

_INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."


class Competition(NamedTuple):
    """A set of problems: its files, one of which is read, and the longest answer to one."""

    files: tuple[str, ...]
    id: str  # the field that names a problem
    new_tokens: int


MATH500 = Competition(
    ("math500/math500.json", "math500/test.jsonl", "math500/math500.jsonl"), "unique_id", 4096
)
AIME24 = Competition(("aime24/aime24.jsonl",), "id", 16384)


def problems(competition: Competition, source: Source) -> list[Example]:
    """The first problems of the file.

    Raises ModuleNotFoundError without sympy, which grades them, before anything is answered.
    """
    require_sympy()
    path = source.file(*competition.files)
    return [
        Example(
            id=str(field(row, competition.id, path)),
            context=f"{field(row, 'problem', path)}\n{_INSTRUCTION}",
            question="",
            answers=(str(field(row, "answer", path)),),
            max_new_tokens=competition.new_tokens,
        )
        for row in rows_of(path, source.count)
    ]


def competition_score(prediction: str, example: Example) -> float:
    """Whether the final answer is the right one."""
    return same_answer(prediction, example.answers[0])
