"""The tasks `shared/...` by name."""

import functools

from lookahead_jax.eval.scorers.text import substring_all
from lookahead_jax.eval.tasks.base import Example, Task
from lookahead_jax.eval.tasks.shared import instructions, retrieval, writings
from lookahead_jax.eval.tasks.shared.retrieval import QUESTIONS, Retrieval

_KV: dict[str, Retrieval] = {
    "kv": functools.partial(retrieval.kv, uuids=False),
    "kv_uuids": functools.partial(retrieval.kv, uuids=True),
    "prefix_suffix": retrieval.prefix_suffix,
}
_HOPS: dict[str, Retrieval] = {
    "hops": functools.partial(retrieval.hops, hops=2),
    "hops_4": functools.partial(retrieval.hops, hops=4),
}
_LEAST = 3 * QUESTIONS  # units that hold a line for every question and two like it


def _found(prediction: str, example: Example) -> float:
    return retrieval.found(prediction, example.answers)


def _share(prediction: str, example: Example) -> float:
    return substring_all(prediction, example.answers)


def tasks() -> list[Task]:
    """shared/<task>; <task>_many asks several questions of one cut context."""
    made = []
    for group, score in ((_KV, _found), (_HOPS, _share)):
        for name, build in group.items():
            for many in (False, True):
                made.append(
                    Task(
                        name=f"shared/{name}{'_many' if many else ''}",
                        make=functools.partial(retrieval.make, build, _LEAST, many),
                        score=score, binary=score is _found,
                    )
                )  # fmt: skip
    for name, needles in (("mrcr", 2), ("mrcr_8", 8)):
        make = functools.partial(writings.make, needles)
        made.append(Task(name=f"shared/{name}", make=make, score=writings.score))
    places: tuple[tuple[str, instructions.Place], ...] = (
        ("", "before"), ("_behind", "behind"), ("_pinned", "pinned"),
    )  # fmt: skip
    for name, place in places:
        make = functools.partial(instructions.make, place)
        made.append(
            Task(name=f"shared/instructions{name}", make=make, score=instructions.score)
        )
    return made
