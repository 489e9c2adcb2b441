"""layers: any policy, with a share of the budget for each layer that a file names."""

import dataclasses
import functools
import json
import math
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.pyramidkv import PyramidKV
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.policies.wrapper import PolicyWrapper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers(PolicyWrapper):
    """Scores by another policy; layers get the shares of the budget that a file names.

    Layer l of L keeps L C w_l / (w_1 + ... + w_L) entries per head, rounded by largest remainder,
    so that the layers keep L C in all. A share beyond the prompt's length is not used, and not
    moved to other layers. A prompt of at most C tokens is kept whole.
    """

    inner: Policy = dataclasses.field(default_factory=SnapKV)
    """The policy that scores, protects and shares a layer's budget among its heads."""
    shares: str = ""
    """JSON file with one number per layer, in proportion to which they share; default: equally. It
    is read once in a process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shares:
            load_shares(self.shares)

    def why_not(self, policy: Policy) -> str | None:
        if isinstance(policy, Layers | PyramidKV):
            return "it shares budgets among layers itself"
        return super().why_not(policy)

    def _entries(self, budget: int, config: ModelConfig) -> np.ndarray:
        """Entries per head of every layer for a long prompt, int32 [L]."""
        layers = config.num_layers
        shares = load_shares(self.shares) if self.shares else (1,) * layers
        if len(shares) != layers:
            raise ValueError(
                f"{self.shares}: {len(shares)} shares do not fit this model of {layers} layers"
            )
        exact = [Fraction(share) * layers * budget / sum(map(Fraction, shares)) for share in shares]
        entries = [math.floor(part) for part in exact]
        order = sorted(range(layers), key=lambda i: (entries[i] - exact[i], i))
        for i in order[: layers * budget - sum(entries)]:
            entries[i] += 1
        return np.asarray(entries, np.int32)

    def layer_budgets(self, length: jax.Array, budget: int, config: ModelConfig) -> jax.Array:
        shares = jnp.minimum(self._entries(budget, config)[:, None], length[None])
        return jnp.where(length[None] <= budget, length[None], shares)

    def max_entries(self, tokens: int, budget: int, config: ModelConfig) -> int:
        most = max(budget, int(self._entries(budget, config).max()))
        return self.inner.max_entries(tokens, most, config)


@functools.cache
def load_shares(file: str) -> tuple[float, ...]:
    """The numbers in a JSON file of shares.

    Raises FileNotFoundError without the file, ValueError unless it is a list of numbers that are
    not negative, and not all 0.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist: give a JSON list of shares")
    try:
        shares = json.loads(Path(file).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    numbers = isinstance(shares, list) and all(
        isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < 2**53 for n in shares
    )
    if not numbers or not any(shares):
        raise ValueError(
            f"{file} is not a list of shares: give one number per layer, such as [3, 2, 1], none "
            "negative and not all 0"
        )
    return tuple(map(float, shares))
