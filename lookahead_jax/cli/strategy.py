"""The options of `generate` that search over continuations."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
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
    reward: Annotated[Text, option("FILE.py:NAME")] = None
    """The reward that some strategies compare by: a function of a Python file, from the prompt and
    a continuation to a number."""
    router: Annotated[Text, option("FILE.py:NAME")] = None
    """What the strategy arbitrage may have instead: a function of a Python file, from the text so
    far and a step of the draft model to the advantage of the model's step."""
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
            for name in ("strategy_arg", "reward", "router", "most_tokens", "most_forwards"):
                if getattr(self, name) not in (None, ()):
                    raise UsageError(f"--{name.replace('_', '-')} needs --strategy NAME")
            return None
        settings = settings_of("--strategy-arg", self.strategy_arg)
        strategy = make_strategy(self.strategy, **settings)
        reward = None if self.reward is None else load_function("--reward", self.reward)
        router = None if self.router is None else load_function("--router", self.router)
        if router is not None and not strategy.routes:
            raise UsageError(f"--strategy {self.strategy} asks no router: leave --router out")
        if router is not None and reward is not None:
            raise UsageError("--router and --reward exclude each other: leave out one")
        if strategy.reads_reward and reward is None and router is None:
            also = " or --router FILE.py:NAME" if strategy.routes else ""
            raise UsageError(f"--strategy {self.strategy} needs --reward FILE.py:NAME{also}")
        if reward is not None and not strategy.reads_reward:
            raise UsageError(f"--strategy {self.strategy} compares no rewards: leave --reward out")
        for name in ("drafter", "draft_nodes") if not strategy.drafts else ():
            if getattr(options.drafting, name) not in ("none", None):
                raise UsageError(
                    f"--strategy {self.strategy} looks at every token before the next: leave "
                    f"--{name.replace('_', '-')} out"
                )
        if options.evict_every is not None:
            raise UsageError("--strategy evicts from the prompt only: leave --evict-every out")
        return Chosen(strategy, reward, router)

    def search(self, run: Run, chosen: "Chosen"):
        """Continues the prompts of a run with `lk.search`."""
        import lookahead_jax as lk

        options = run.options
        default = options.sampling == SamplingOptions()
        shared = run.arguments()
        shared.update(
            sampling=None if default else options.sampling.make(),
            strategy=chosen.rule,
            reward=chosen.reward,
            router=chosen.router,
            draft_model=run.small if chosen.rule.routes else None,
            drafter=run.drafter,
            draft_nodes=options.drafting.draft_nodes,
            most_tokens=self.most_tokens,
            most_forwards=self.most_forwards,
        )
        return lk.search(run.model, **shared)


class Chosen(NamedTuple):
    """A strategy, and the functions that guide it."""

    rule: Any
    reward: Callable[[str, str], float] | None
    router: Callable[[str, str], float] | None


def load_function(name: str, place: str) -> Callable[[str, str], float]:
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
    return cast(Callable[[str, str], float], found)
