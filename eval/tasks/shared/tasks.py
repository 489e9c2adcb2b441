"""The tasks `shared/...` by name."""

import functools

from lookahead_jax.eval.scorers.text import substring_all
from lookahead_jax.eval.tasks.base import Example, Task
from lookahead_jax.eval.tasks.shared import instructions, retrieval, writings
from lookahead_jax.eval.tasks.shared.instructions import Place
from lookahead_jax.eval.tasks.shared.retrieval import Retrieval

_LOOKUPS: dict[str, tuple[Retrieval, int]] = {
    "kv": (functools.partial(retrieval.kv, uuids=False), 16),
    "kv_uuids": (functools.partial(retrieval.kv, uuids=True), 48),
    "prefix_suffix": (retrieval.prefix_suffix, 32),
}
_CHAINS: dict[str, tuple[Retrieval, int]] = {
    "hops": (functools.partial(retrieval.hops, hops=2), 48),
    "hops_4": (functools.partial(retrieval.hops, hops=4), 48),
}
"""Name -> retrieval, and the tokens that an answer may have."""


def _found(prediction: str, example: Example) -> float:
    return retrieval.found(prediction, example.answers)


def _share(prediction: str, example: Example) -> float:
    return substring_all(prediction, example.answers)


def tasks() -> list[Task]:
    """shared/<task>; <task>_many asks several questions of one cut context."""
    made = []
    for group, score in ((_LOOKUPS, _found), (_CHAINS, _share)):
        for name, (build, answer) in group.items():
            for many in (False, True):
                made.append(
                    Task(
                        name=f"shared/{name}{'_many' if many else ''}",
                        make=functools.partial(retrieval.make, build, answer, many),
                        score=score, binary=score is _found,
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
