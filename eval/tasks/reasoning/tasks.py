"""The tasks `reasoning/...`: their problems, scores, and rewards that need no answer."""

import functools

from lookahead_jax.eval.tasks.base import Task
from lookahead_jax.eval.tasks.reasoning.arithmetic import (
    chain_score,
    chains,
    countdown,
    countdown_score,
)
from lookahead_jax.eval.tasks.reasoning.competitions import (
    AIME24,
    MATH500,
    competition_score,
    problems,
)
from lookahead_jax.eval.tasks.reasoning.constrained import (
    constrained,
    constrained_score,
    share_met,
)
from lookahead_jax.eval.tasks.reasoning.gsm8k import gsm8k, gsm8k_score
from lookahead_jax.eval.tasks.reasoning.programs import hidden_tests, programs, public_tests


def tasks() -> list[Task]:
    """reasoning/<task>."""
    return [
        Task(name="reasoning/chains", make=chains, score=chain_score, binary=True),
        Task(
            name="reasoning/countdown", make=countdown, score=countdown_score, binary=True,
            reward=countdown_score,
        ),
        Task(
            name="reasoning/constrained", make=constrained, score=constrained_score, binary=True,
            reward=share_met,
        ),
        Task(
            name="reasoning/programs", make=programs, score=hidden_tests, binary=True,
            reward=public_tests, executes=True,
        ),
        *(
            Task(
                name=f"reasoning/gsm8k{name}", make=functools.partial(gsm8k, bool(name)),
                score=gsm8k_score, binary=True,
            )
            for name in ("", "_easiest")
        ),
        *(
            Task(
                name=f"reasoning/{name}", make=functools.partial(problems, competition),
                score=competition_score, binary=True,
            )
            for name, competition in (("math500", MATH500), ("aime24", AIME24))
        ),
    ]  # fmt: skip
