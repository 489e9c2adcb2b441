"""The strategies of a grid: their names, what they need, and the rewards they compare by."""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.eval.tasks.base import Example, Task, scored
from lookahead_jax.strategies.base import Strategy
from lookahead_jax.strategies.guides import checked_sampling
from lookahead_jax.strategies.registry import make_strategy
from lookahead_jax.strategies.rows import Reward

NONE, ORACLE = "none", "oracle"
_SAMPLING = {"temperature": float, "top_k": int, "top_p": float, "min_p": float}
Grader = Callable[[str, Example], float]
"""(a continuation as far as it has come, its example) -> how good it is."""


class Decoding(NamedTuple):
    """How a cell continues its prompts."""

    strategy: Strategy | None  # None: `lk.generate`
    sampling: Sampling | None  # None: greedy, or the strategy's own


def named_settings(kind: str, spec: str, text: str) -> dict[str, str]:
    """`field=value,...` -> the settings; ValueError naming `spec` for anything else."""
    pairs = [pair.partition("=") for pair in re.split(r",(?=\w+=)", text) if pair]
    if any(not field or not equals for field, equals, _ in pairs):
        raise ValueError(f"{kind} {spec!r}: settings are name=value, separated by commas")
    settings = {field: value for field, _, value in pairs}
    if len(settings) < len(pairs):
        raise ValueError(f"{kind} {spec!r}: a setting stands there twice")
    return settings


def decoding_of(spec: str) -> Decoding:
    """`name` or `name:field=value,...` -> how to decode.

    temperature, top_k, top_p and min_p set the sampling, where a strategy has no fields of these
    names; `none:temperature=0.8` samples one continuation. Raises ValueError for unknown names,
    settings and values, and for sampling that a strategy cannot use.
    """
    name, _, text = spec.partition(":")
    fields = named_settings("strategy", spec, text)
    own: set[str] = set()
    if name != NONE:
        own = {field.name for field in dataclasses.fields(make_strategy(name))}
    drawn: dict[str, Any] = {}
    for key in (fields.keys() & _SAMPLING.keys()) - own:
        try:
            drawn[key] = _SAMPLING[key](fields.pop(key))
        except ValueError:
            raise ValueError(f"strategy {spec!r}: {key} is not a number") from None
    if name == NONE:
        if fields:
            known = ", ".join(_SAMPLING)
            raise ValueError(f"strategy {spec!r}: unknown setting {min(fields)!r}; known: {known}")
        return Decoding(None, Sampling(**drawn) if drawn else None)
    strategy = make_strategy(name, **fields)
    if not drawn:
        return Decoding(strategy, None)
    sampling = dataclasses.replace(strategy.default_sampling, **drawn)
    try:
        return Decoding(strategy, checked_sampling(strategy, sampling))
    except ValueError as error:
        raise ValueError(f"strategy {spec!r}: {error}") from None


class RewardKind(NamedTuple):
    """What the strategies of a cell compare by, and its name in the rows."""

    kind: str
    grade: Grader


def reward_of(task: Task, oracle: bool) -> RewardKind | None:
    """The task's own reward, which knows the prompt only, or else, if allowed, an oracle.

    The oracle is the task's score, which knows the answer.
    """
    if task.reward is not None:
        return RewardKind("task", task.reward)
    if not oracle or task.score is None:
        return None
    return RewardKind(ORACLE, lambda text, example: scored(task, text, example)[0] or 0.0)


def reward_by_prompt(
    grade: Grader,
    prompts: Sequence[Sequence[int]],
    examples: Sequence[Example],
    tokenizer: Tokenizer,
) -> Reward:
    """A reward that finds a continuation's example by its prompt."""
    by_text: Mapping[str, Example] = {
        tokenizer.decode(list(prompt)): example
        for prompt, example in zip(prompts, examples, strict=True)
    }

    @functools.lru_cache(maxsize=4096)  # rows that were resampled have the same text
    def reward(prompt: str, text: str) -> float:
        return grade(text, by_text[prompt])

    return reward


def seed_of(run_seed: int, example: Example) -> int:
    """The seed of an example's samples: the same for all strategies and batches."""
    return zlib.crc32(f"{run_seed}/{example.id}".encode())
