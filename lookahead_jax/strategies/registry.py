"""The strategies by name. `make_strategy` builds one."""

import dataclasses
import typing
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from lookahead_jax.strategies.base import Strategy


class Entry(NamedTuple):
    """One strategy."""

    path: str  # of its class, below lookahead_jax.strategies
    summary: str  # one sentence, for help texts


STRATEGIES = {
    "beam": Entry("beam.Beam", "The most likely texts that a few rows can hold (beam search)."),
    "contrastive": Entry(
        "contrastive.Contrastive",
        "Likely tokens whose hidden states are unlike those of the text (contrastive search).",
    ),
    "momentum": Entry(
        "momentum.Momentum",
        "Greedy, against a resistance that grows with the repeated n-gram (Momentum Decoding).",
    ),
    "cautious": Entry(
        "cautious.Cautious",
        "Where the model is unsure, several samples up to punctuation; the likeliest goes on "
        "(Cautious Next Token Prediction).",
    ),
    "adadec": Entry(
        "adadec.AdaDec",
        "Greedy, and where the model is unsure a short look ahead after each candidate (AdaDec).",
    ),
    "best_of_n": Entry("best_of.BestOfN", "Several samples; the highest reward wins."),
    "self_consistency": Entry(
        "self_consistency.SelfConsistency",
        "Several samples; the most frequent answer wins, by default the last number.",
    ),
    "latr": Entry(
        "latr.LATR",
        "Texts that branch where the model is unsure and stay where the branch differs for long; "
        "a reward or the most frequent answer wins (LATR).",
    ),
    "first_finish": Entry(
        "first_finish.FirstFinish", "Several samples; the first to end wins (First Finish Search)."
    ),
    "particles": Entry(
        "particles.ParticleFilter",
        "Several samples, resampled after each step by the reward of their text so far "
        "(particle filtering).",
    ),
    "entropic_particles": Entry(
        "particles.EntropicParticleFilter",
        "The same with flatter weights while few particles hold most of them early on (Entropic "
        "Particle Filtering).",
    ),
    "a_star": Entry(
        "a_star.AStar",
        "Steps of reasoning, always after the most promising text so far by its reward "
        "(A*-Decoding).",
    ),
    "planned": Entry(
        "planned.Planned",
        "Tree search over the likeliest tokens for the text of highest reward, such as passed "
        "tests (PG-TD).",
    ),
    "arbitrage": Entry(
        "arbitrage.Arbitrage",
        "Steps of a draft model, but the model's where a reward or a router says that these are "
        "better; lossy (Arbitrage).",
    ),
    "trimr": Entry(
        "trimr.TrimR",
        "Ends thinking that a verifier finds converged or lost, or that goes in circles (TrimR).",
    ),
    "subtasks": Entry(
        "subtasks.Subtasks",
        "The inner working of finished subtasks leaves the cache, their conclusions stay (TIM).",
    ),
    "think_router": Entry(
        "think_router.ThinkRouter",
        "While it thinks, samples where it is unsure, else a mean of token embeddings; lossy "
        "(ThinkRouter).",
    ),
    "hogwild": Entry(
        "hogwild.Hogwild",
        "Workers that write in parallel and read each other's texts as they grow (Hogwild! "
        "Inference).",
    ),
}


_PATTERNS = ("pattern", "opens", "closes")  # regular expressions, with escapes of their own


def strategy_summaries() -> dict[str, str]:
    """One sentence per strategy; neither jax nor a strategy is imported for it."""
    return {name: entry.summary for name, entry in STRATEGIES.items()}


def make_strategy(name: str, **arguments: Any) -> "Strategy":
    """The strategy called `name` with its settings, which may be text, as on a command line.

    Raises ValueError, listing what is possible, for an unknown name, setting or value.
    """
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}; known: {', '.join(STRATEGIES)}")
    module, _, kind = STRATEGIES[name].path.rpartition(".")
    make = getattr(import_module(f"lookahead_jax.strategies.{module}"), kind)
    types = typing.get_type_hints(make)
    fields = [field.name for field in dataclasses.fields(make)]
    for key in arguments:
        if key not in fields:
            raise ValueError(
                f"strategy {name}: unknown setting {key!r}; known: {', '.join(fields)}"
            )
    try:
        return make(**{key: _parse(key, types[key], value) for key, value in arguments.items()})
    except ValueError as error:
        raise ValueError(f"strategy {name}: {error}") from None


def _parse(key: str, kind: Any, value: Any) -> Any:
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(f"{key}={value} is not possible: choose {' or '.join(choices)}")
        return value
    if kind is str:
        # A pattern has escapes of its own.
        return str(value) if key in _PATTERNS else str(value).replace("\\n", "\n")
    try:
        return kind(str(value))
    except ValueError:
        wanted = {int: "an integer", float: "a number"}[kind]
        raise ValueError(f"{key}={value} is not {wanted}") from None
