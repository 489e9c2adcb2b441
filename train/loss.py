"""What the loss of lookahead modules compares, and its parts.

Letters: V sets of modules, B batch.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from lookahead_jax.host.integers import check_integer
from lookahead_jax.modules.definition import LookaheadConfig
from lookahead_jax.policies.lookaheadkv import LookaheadKV

Response = Literal["mean", "max"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What the loss compares. The defaults are those of the paper, without a memory."""

    skip: int = 0
    """Number of leading prompt entries that the loss leaves out: attention sinks, which hold most
    of the mass."""
    response: Response = "mean"
    """How the attention of a response's tokens becomes one target."""
    memory: float = 0.0
    """Weight of the divergence of the response's next tokens on the cut cache, for modules with a
    memory."""
    budgets: tuple[int, ...] = (64, 128, 256)
    """Entries per layer and head, the memory's included, to which prompts are cut for it."""
    policy: LookaheadKV = dataclasses.field(default_factory=LookaheadKV)
    """The settings by which they are cut."""

    @property
    def described(self) -> dict[str, Any]:
        """The settings by name; those of a memory only with one, as before there were any."""
        fields = dataclasses.asdict(self)
        return fields if self.memory else {name: fields[name] for name in ("skip", "response")}

    def __post_init__(self) -> None:
        check_integer("loss skip", self.skip, least=0)
        if not (math.isfinite(self.memory) and self.memory >= 0):
            raise ValueError(f"loss memory {self.memory} must be 0 or a positive number")
        if not self.budgets:
            raise ValueError("loss budgets: give at least one")
        for budget in self.budgets:
            check_integer("a budget of the loss", budget, least=1)
        if self.response not in get_args(Response):
            raise ValueError(f"unknown response {self.response!r}; known: mean, max")


PAPER = LossConfig()


def check_loss(modules: LookaheadConfig, loss: LossConfig) -> None:
    """Raises ValueError unless modules of these sizes can be trained with the loss."""
    if loss.memory and not modules.memory:
        raise ValueError(
            f"loss memory {loss.memory} trains what the tokens leave in the cache: set memory of "
            "the modules to True"
        )
    if modules.memory and not loss.memory:
        raise ValueError(
            "the modules have a memory, which nothing trains: give loss memory a weight, such as 1"
        )
    if loss.memory and min(loss.budgets) - modules.tokens <= loss.policy.window:
        raise ValueError(
            f"loss budgets {list(loss.budgets)}: each has to exceed the {modules.tokens} tokens of "
            f"the memory and the window of {loss.policy.window}"
        )


class LossParts(NamedTuple):
    """The losses of V sets of modules on B rows, before they are weighted."""

    importance: jax.Array  # [V, B] float32
    memory: jax.Array  # [V, B] float32, 0 without a memory

    def total(self, losses: Sequence[LossConfig]) -> jax.Array:
        """The weighted sums [V, B]."""
        weights = jnp.asarray([loss.memory for loss in losses], jnp.float32)
        return self.importance + weights[:, None] * self.memory
