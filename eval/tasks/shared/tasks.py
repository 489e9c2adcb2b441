"""The tasks `shared/...` by name."""

import functools
from collections.abc import Callable, Sequence

from lookahead_jax.eval.scorers.text import substring_all
from lookahead_jax.eval.tasks.base import Example, Task
from lookahead_jax.eval.tasks.shared import instructions, retrieval, writings
from lookahead_jax.eval.tasks.shared.instructions import Place
from lookahead_jax.eval.tasks.shared.retrieval import Retrieval

Score = Callable[[str, Sequence[str]], float]
_RETRIEVALS: dict[str, tuple[Retrieval, int, Score]] = {
    "kv": (functools.partial(retrieval.kv, uuids=False), 16, retrieval.looked_up),
    "kv_uuids": (functools.partial(retrieval.kv, uuids=True), 48, retrieval.looked_up),
    "prefix_suffix": (retrieval.prefix_suffix, 32, retrieval.found),
    "hops": (functools.partial(retrieval.hops, hops=2), 48, substring_all),
    "hops_4": (functools.partial(retrieval.hops, hops=4), 48, substring_all),
}
"""Name -> retrieval, the tokens that an answer may have, and its score by the right answers."""


def _scored(score: Score, prediction: str, example: Example) -> float:
    return score(prediction, example.answers)


def tasks() -> list[Task]:
    """shared/<task>; <task>_many asks several questions of one cut context."""
    made = []
    for name, (build, answer, score) in _RETRIEVALS.items():
        for many in (False, True):
            made.append(
                Task(
                    name=f"shared/{name}{'_many' if many else ''}",
                    make=functools.partial(retrieval.make, build, answer, many),
                    score=functools.partial(_scored, score), binary=score is not substring_all,
                )
            )  # fmt: skip
    for name, needles in (("mrcr", 2), ("mrcr_8", 8)):
        make = functools.partial(writings.make, needles)
        made.append(Task(name=f"shared/{name}", make=make, score=writings.score))
    places: tuple[Place, ...] = ("before", "behind", "pinned")
    for place in places:
        suffix = "" if place == "before" else f"_{place}"
        obey = functools.partial(instructions.make, "follow", place)
        recite = functools.partial(instructions.make, "recite", place)
        made += [
            Task(name=f"shared/instructions{suffix}", make=obey, score=instructions.followed),
            Task(name=f"shared/recited{suffix}", make=recite, score=instructions.recited),
        ]
    return made
