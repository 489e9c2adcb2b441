"""Which policies a grid can evict with while decoding, and from prompts that all cells share."""

from collections.abc import Mapping, Sequence

from lookahead_jax.decoding.eviction import DecodeEviction
from lookahead_jax.policies.base import Policy, WithCuts, WithDraft


def check_eviction(
    interval: int, policies: Mapping[str, Policy], searched: Sequence[str], *, hidden: bool
) -> None:
    """Raises ValueError, naming it, if a method or a strategy cannot evict every `interval` tokens.

    `policies` are those of the methods with a budget, `searched` the strategies; `hidden`: whether
    questions are read behind a compressed context.
    """
    if searched:
        raise ValueError(f"{searched[0]} evicts from the prompt only: leave evict_every out")
    for name, policy in policies.items():
        try:
            eviction = DecodeEviction(policy=policy, budget=1, interval=interval)
        except ValueError as error:
            raise ValueError(f"policies={name}, evict_every={interval}: {error}") from None
        if eviction.adds_up and hidden:
            raise ValueError(
                f"policies={name} adds up scores and would miss those of questions: leave "
                "evict_every or the protocol hidden out"
            )


def check_shared(name: str, policy: Policy) -> None:
    """Raises ValueError for a policy that cannot cut a prompt that has been read without it."""
    if isinstance(policy.reading, WithCuts | WithDraft):
        needs = "cuts" if isinstance(policy.reading, WithCuts) else "a draft"
        raise ValueError(
            f"policies={name} needs {needs} while a prompt is read: leave it or share_reading out"
        )
