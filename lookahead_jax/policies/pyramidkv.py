"""pyramidkv: snapkv scores, more room in the lower layers (arXiv 2406.02069)."""

import dataclasses

import jax
import jax.numpy as jnp

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.selection import largest_remainder
from lookahead_jax.policies.snapkv import SnapKV


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """As snapkv, with more entries in the first layers than in the last.

    Budgets fall linearly from layer to layer. With w the window: lo = (C - w) // beta for the last
    layer, hi = 2 (C - w) - lo for the first; if hi exceeds the T - w entries there are,
    hi = T - w and lo = 2 (C - w) - hi. The window is added to every layer. The published code
    floors each layer; here the largest remainders are rounded up, so that the mean over layers is
    exactly min(C, T) in every row. (kvpress falls back to snapkv unless C >= beta w; this never
    does.) If a sliding-window layer cannot use its whole share, the rest is not moved to other
    layers.
    """

    beta: int = 20
    """Ratio that sets how little the last layer gets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"beta={self.beta} must be at least 1")

    def _ends(self, budget: int) -> tuple[int, int, int]:
        window = self.window_rows(budget)
        low = (budget - window) // self.beta
        return window, low, 2 * (budget - window) - low

    def layer_budgets(self, length: jax.Array, budget: int, config: ModelConfig) -> jax.Array:
        layers = config.num_layers
        window, _, high = self._ends(budget)
        rest = budget - window
        if layers == 1 or rest == 0:
            return super().layer_budgets(length, budget, config)
        high = jnp.minimum(high, jnp.maximum(length - window, rest))  # [B]
        low = 2 * rest - high
        # hi + l (lo - hi) / (L - 1), kept as a whole number of (L - 1)-ths.
        steps = layers - 1
        layer = jnp.arange(layers, dtype=jnp.int32)[:, None]
        scaled = high[None] * (steps - layer) + low[None] * layer  # [L, B]
        floors = scaled // steps
        room = high[None] - floors
        shares = largest_remainder(
            floors, scaled - floors * steps, room, jnp.full_like(length, layers * rest)
        )
        return jnp.minimum(shares + window, length[None])

    def max_entries(self, tokens: int, budget: int, config: ModelConfig) -> int:
        window, _, high = self._ends(budget)
        return min(tokens, budget if config.num_layers == 1 else window + high)
