"""The configuration of `lookahead eval agreement`."""

import dataclasses
from pathlib import Path
from typing import Literal

from lookahead_jax.decoding.eviction import DecodeEviction
from lookahead_jax.eval.grid.config import EMBEDDED, method_of, modules_folder_of
from lookahead_jax.host.config_files import check_at_least_one
from lookahead_jax.policies.base import (
    OnePass,
    WithCuts,
    WithLookup,
    WithModules,
    WithResponse,
    check_positions,
)

OWN_TOKENS = 32
"""Tokens of the model's own answer, if no other number is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgreementConfig:
    """Measure how closely a model on a cut cache follows itself on the full cache."""

    prompts: Path
    """JSON lines, each with `messages`, `prompt`, or `turns` (of which the first is taken);
    `category` and `id` are optional. Answers that are given: see --responses."""
    out: Path
    """Folder of the run, created if missing. The same command resumes the run."""
    model: str = EMBEDDED
    """The model, as --model of other commands names it; `embedded` is the one that ships."""
    policies: tuple[str, ...] = ("snapkv",)
    """Policies, with settings after a colon: snapkv:window=8,pool=none. Policies around others:
    critical:ada:snapkv."""
    budgets: tuple[int, ...] = (64, 128, 256)
    """Entries kept per layer and KV head. Prompts that are not longer than the largest are left
    out; with --evict-every, prompts that with the longest answer of their own, or with the one
    that is given, are not."""
    evict_every: int | None = None
    """Evict while decoding too, at every position that is a multiple of this, in the answer that is
    forced and in the one that is written. Default: only after the prompt."""
    responses: Literal["own", "given"] = "own"
    """The answer that is forced: the model's own on the full cache, or the one of the file, which
    is the last message (of the assistant) or `response` beside `prompt`. `given` needs
    --evict-every."""
    categories: tuple[str, ...] = ()
    """Categories of prompts to use. Default: all."""
    count: int = 20
    """Prompts of each category, at most: the first of the file."""
    longest: int = 4096
    """Longer prompts, with the answers that are given, are left out."""
    response_tokens: int | None = None
    """Tokens of the answer, at most. They are compared. Default: 32 of the model's own, all of one
    that is given."""
    lookahead: Path | None = None
    """Folder of lookahead modules. Default: those that ship for the model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights. Default: that of the checkpoint."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "count", "response_tokens", "evict_every")
        if not self.budgets or min(self.budgets) < 1:
            raise ValueError("--budgets must be numbers of at least 1")
        if self.responses == "given" and self.evict_every is None:
            raise ValueError("--responses given is for --evict-every: give it too")
        if not self.policies:
            raise ValueError("--policies names no policy")
        for name in ("budgets", "policies"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"--{name} names one value twice")
        for spec in self.policies:
            method = method_of(spec)
            reading = method.policy.reading
            if isinstance(reading, WithCuts):
                raise ValueError(
                    f"--policies {spec} cuts the prompt while it is read, which no comparison with "
                    "the full cache does: use `lookahead eval run`"
                )
            masked = isinstance(reading, (OnePass, WithLookup, WithModules, WithResponse))
            if not method.budgeted or method.prune is not None or method.predicts or not masked:
                raise ValueError(
                    f"--policies {spec}: only policies that cut a cache, without a small model, a "
                    "drafter or a replay of the prompt, can be compared with the full cache"
                )
            try:
                if self.evict_every is None:
                    check_positions(method.policy, "a comparison")
                else:
                    DecodeEviction(
                        policy=method.policy, budget=min(self.budgets), interval=self.evict_every
                    )
            except ValueError as error:
                raise ValueError(f"--policies {spec}: {error}") from None
            if (
                isinstance(reading, WithResponse)
                and reading.draft_policy is not None
                and reading.tokens > self.own_tokens
            ):
                raise ValueError(
                    f"--policies {spec} drafts {reading.tokens} tokens: give --response-tokens "
                    f"{reading.tokens} or more, or the policy fewer"
                )

    @property
    def own_tokens(self) -> int:
        """Tokens of the model's own answer, at most."""
        return OWN_TOKENS if self.response_tokens is None else self.response_tokens

    @property
    def modules(self) -> Path | None:
        """The folder of the modules, if a policy reads them; ValueError if there is none."""
        if not any(map(reads_modules, self.policies)):
            return None
        folder = modules_folder_of(self.lookahead, self.model)
        if folder is None:
            raise ValueError("a policy reads lookahead modules: give their folder as --lookahead")
        return folder


def reads_modules(spec: str) -> bool:
    """Whether a policy reads lookahead modules."""
    return isinstance(method_of(spec).policy.reading, WithModules)
