"""The options of `generate` that search over continuations."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

from lookahead_jax.cli.options import (
    Repeated,
    Run,
    RunOptions,
    SamplingOptions,
    Text,
    option,
    settings_of,
)
from lookahead_jax.host.config_files import UsageError


@dataclass(frozen=True, kw_only=True)
class StrategyOptions:
    strategy: Annotated[Text, option("NAME")] = None
    """Continue each prompt by a strategy that searches, in several rows or several times. The text
    is printed at its end. The sampling is the strategy's own unless a sampling option is given."""
    strategy_arg: Annotated[Repeated, option("NAME=VALUE")] = ()
    """A setting of the strategy. May be repeated."""
    reward: Annotated[Text, option("FILE.py:NAME|DIR")] = None
    """The reward that some strategies compare by: a function of a Python file, from the prompt and
    a continuation to a number; or a reward head of the model, the folder of its run or its file."""
    router: Annotated[Text, option("FILE.py:NAME")] = None
    """What the strategy arbitrage may have instead: a function of a Python file, from the text so
    far and a step of the draft model to the advantage of the model's step."""
    verifier: Annotated[Text, option("FILE.py:NAME")] = None
    """Whom the strategy trimr asks about thoughts: a function of a Python file, from the prompt, an
    answer and an earlier one or None to a probability. Default: the model itself."""
    most_tokens: Annotated[int | None, option("INT")] = None
    """Most tokens that all rows of a prompt may emit together. Default: no limit."""
    most_forwards: Annotated[int | None, option("INT")] = None
    """Most steps of the model for a prompt. Default: no limit."""

    def make(self, options: RunOptions) -> "Chosen | None":
        """The strategy these options name, or None, before a model is loaded.

        UsageError for options without a strategy, and for options of a run that it cannot have.
        """
        from lookahead_jax.strategies.registry import make_strategy

        if self.strategy is None:
            for name in (
                "strategy_arg", "reward", "router", "verifier", "most_tokens", "most_forwards",
            ):  # fmt: skip
                if getattr(self, name) not in (None, ()):
                    raise UsageError(f"--{name.replace('_', '-')} needs --strategy NAME")
            return None
        settings = settings_of("--strategy-arg", self.strategy_arg)
        strategy = make_strategy(self.strategy, **settings)
        reward = None if self.reward is None else load_reward(self.reward)
        router = None if self.router is None else load_function("--router", self.router)
        verifier = None if self.verifier is None else load_function("--verifier", self.verifier)
        if verifier is not None and not strategy.verifies:
            raise UsageError(f"--strategy {self.strategy} asks no verifier: leave --verifier out")
        if router is not None and not strategy.routes:
            raise UsageError(f"--strategy {self.strategy} asks no router: leave --router out")
        if router is not None and reward is not None:
            raise UsageError("--router and --reward exclude each other: leave out one")
        if strategy.reads_reward and reward is None and router is None:
            also = ", or --router FILE.py:NAME" if strategy.routes else ""
            raise UsageError(f"--strategy {self.strategy} needs --reward FILE.py:NAME or DIR{also}")
        if reward is not None and strategy.reads_reward is False:
            raise UsageError(f"--strategy {self.strategy} compares no rewards: leave --reward out")
        for name in ("drafter", "draft_nodes") if not strategy.drafts else ():
            if getattr(options.drafting, name) not in ("none", None):
                raise UsageError(
                    f"--strategy {self.strategy} looks at every token before the next: leave "
                    f"--{name.replace('_', '-')} out"
                )
        if options.evict_every is not None:
            raise UsageError("--strategy evicts from the prompt only: leave --evict-every out")
        return Chosen(strategy, reward, router, verifier)

    def search(self, run: Run, chosen: "Chosen"):
        """Continues the prompts of a run with `lk.search`."""
        import lookahead_jax as lk

        options = run.options
        default = options.sampling == SamplingOptions()
        reward = chosen.reward
        if isinstance(reward, Path):
            reward = lk.reward_head(reward, run.model)
        shared = run.arguments()
        shared.update(
            sampling=None if default else options.sampling.make(),
            strategy=chosen.rule,
            reward=reward,
            router=chosen.router,
            verifier=chosen.verifier,
            draft_model=run.small if chosen.rule.routes else None,
            drafter=run.drafter,
            draft_nodes=options.drafting.draft_nodes,
            most_tokens=self.most_tokens,
            most_forwards=self.most_forwards,
        )
        return lk.search(run.model, **shared)


class Chosen(NamedTuple):
    """A strategy, and what guides it."""

    rule: Any
    reward: Callable[[str, str], float] | Path | None  # a path is that of a head
    router: Callable[[str, str], float] | None
    verifier: Callable[[str, str, str | None], float] | None


def load_reward(place: str) -> Callable[[str, str], float] | Path:
    """The function that --reward names, or the path of a reward head."""
    if os.path.exists(place) and not place.endswith(".py"):
        return Path(place)
    if ".py:" not in place:
        raise UsageError(
            f"--reward takes FILE.py:NAME, or the folder or file of a reward head, not {place!r}"
        )
    return load_function("--reward", place)


def load_function(name: str, place: str) -> Callable[..., float]:
    """The function that the option `name` gives as FILE.py:NAME; runs the file."""
    path, _, function = place.rpartition(":")
    if not path or not function:
        raise UsageError(f"{name} takes FILE.py:NAME, not {place!r}")
    spec = importlib.util.spec_from_file_location(name[2:], path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{name} {place}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = vars(module).get(function)
    if not callable(found):
        raise UsageError(f"{name} {place}: {path} has no function {function}")
    return cast(Callable[..., float], found)
