"""LongProc and MT-Bench, from local files.

    longproc/<task>_<size>.jsonl   input_prompt, reference_output, metadata (JSON text or object)
    mt_bench/question.jsonl        question_id, category, turns

LongProc's prompts come whole, so no question can be hidden from them. MT-Bench has no score
without a judge. Its second turn is asked after the model's own first answer; as in FastChat the
whole dialogue is then read anew, and here cut to the budget again. Decoding is greedy, where
FastChat samples in some categories.
"""

import dataclasses
import functools
import json
from collections.abc import Callable

from lookahead_jax.eval.scorers import longproc as scores
from lookahead_jax.eval.tasks.base import Example, Source, Task, field, rows_of

SIZES = {"0.5k": 1024, "2k": 3072, "8k": 9216}  # tokens of an answer
LONGPROC_SIZES: dict[str, tuple[str, ...]] = {
    "path_traversal": ("0.5k", "2k", "8k"),
    "html_to_tsv": ("0.5k", "2k", "8k"),
    "pseudo_to_code": ("0.5k", "2k"),
    "tom_tracking": ("0.5k", "2k", "8k"),
    "countdown": ("0.5k", "2k", "8k"),
    "travel_planning": ("2k", "8k"),
}


def _make(name: str, size: str, source: Source) -> list[Example]:
    path = source.file(f"longproc/{name}_{size}.jsonl")
    found = []
    for i, row in enumerate(rows_of(path, source.count)):
        metadata = row.get("metadata") or {}
        found.append(
            Example(
                id=str(i),
                context=field(row, "input_prompt", path),
                question="",
                answers=(field(row, "reference_output", path),),
                max_new_tokens=SIZES[size],
                extra=json.loads(metadata) if isinstance(metadata, str) else metadata,
            )
        )
    return found


def _score(name: str, prediction: str, example: Example) -> scores.Measures:
    return getattr(scores, name)(prediction, example.answers[0], example.extra)


def _mt_bench(source: Source) -> list[Example]:
    path = source.file("mt_bench/question.jsonl")
    found = []
    for i, row in enumerate(rows_of(path, source.count)):
        first, *later = field(row, "turns", path)
        found.append(
            Example(
                id=str(row.get("question_id", i)),
                context=first,
                question="",
                max_new_tokens=1024,
                extra={"category": row.get("category", ""), "later": tuple(later)},
            )
        )
    return found


def _next_turn(example: Example, prediction: str) -> Example | None:
    """The next question, with all earlier turns; ids are 81, 81:2, ..."""
    if not (later := example.extra["later"]):
        return None
    said = (*example.turns, (str(example.context), prediction.strip()))
    return dataclasses.replace(
        example,
        id=f"{example.id.partition(':')[0]}:{len(said) + 1}",
        context=later[0],
        turns=said,
        extra=dict(example.extra) | {"later": later[1:]},
    )


def tasks() -> list[Task]:
    """longproc/<task>_<size> and mt_bench."""
    found = [Task(name="mt_bench", make=_mt_bench, score=None, follow=_next_turn)]
    for name, sizes in LONGPROC_SIZES.items():
        for size in sizes:
            make: Callable[[Source], list[Example]] = functools.partial(_make, name, size)
            found.append(
                Task(
                    name=f"longproc/{name}_{size}",
                    make=make,
                    score=functools.partial(_score, name),
                    binary=name != "html_to_tsv",
                    executes=name == "pseudo_to_code",
                )
            )
    return found
