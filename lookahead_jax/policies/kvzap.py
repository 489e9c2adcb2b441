"""kvzap: what a small surrogate expects kvzip+ to say, from hidden states (arXiv 2601.07891)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.base import CutByTokens, Policy, protected_share
from lookahead_jax.policies.statistics_file import check_shape, load_statistics
from lookahead_jax.policies.view import Chunk, LayerView, Queries

COMMAND = "`lookahead train kvzap`"
# F is the width of the hidden layer, which a linear surrogate does not have.
LETTERS = {"weight": "LFK", "bias": "LK", "hidden_weight": "LDF", "hidden_bias": "LF"}
HIDDEN = ("hidden_weight", "hidden_bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVzap(Policy):
    """Keeps the entries whose hidden states predict a high score of kvzip+.

    For each layer and KV head a linear function, or a network with one hidden layer, of what the
    layer's attention reads (the residual stream after the norm) gives the logarithm of kvzip+'s
    score: one small product instead of a second pass. The scores of a token depend on the text up
    to it alone, and stay as they are: while decoding, a cut gives new tokens theirs. The last
    `window` tokens are kept and count in C; a window of C or more is reduced to C // 2. The source
    keeps what reaches a threshold, whatever the number: `threshold:kvzap:least=-4` with a budget
    that is large enough; `ada:kvzap` shares a budget among the heads of a layer.
    """

    file: str
    """Safetensors file with the surrogate, from `lookahead train kvzap`. It is read once in a
    process, and is part of the compiled programs."""
    window: int = 128
    """Last tokens, always kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 0:
            raise ValueError(f"window={self.window} must not be negative")
        _load(self.file)

    @property
    def decode_cut(self) -> CutByTokens:
        return CutByTokens(adds_up=True)

    def init_stats(self, batch: int, tokens: int, config: ModelConfig) -> jax.Array:
        """Log-scores of the tokens, [B, K, T] float32."""
        return jnp.zeros((batch, config.num_kv_heads, tokens), jnp.float32)

    def accumulate(self, stats: jax.Array, chunk: Chunk) -> jax.Array:
        found = self._predicted(chunk.layer, chunk.x, chunk.config)
        start = chunk.end - chunk.x.shape[1]
        return jax.lax.dynamic_update_slice_in_dim(stats, found.swapaxes(1, 2), start, axis=2)

    def score(self, view: LayerView) -> jax.Array:
        if view.sums is not None and view.queries is not None:
            return view.sums + self._of_new_tokens(view, view.queries)
        if view.stats is None:
            raise ValueError("kvzap scores by hidden states, and a cache has none")
        return view.stats

    def _of_new_tokens(self, view: LayerView, new: Queries) -> jax.Array:
        """Log-scores of the entries that the observers have written, 0 of others: [B, K, T]."""
        if new.x is None:
            raise ValueError("kvzap scores by hidden states, and these rows have none")
        found = self._predicted(view.layer, new.x, view.config).swapaxes(1, 2)
        rows = new.pos.shape[1]
        at = jnp.broadcast_to(view.pos - view.length[:, None, None] + rows, view.k.shape[:3])
        written = jnp.take_along_axis(new.pos[:, None], jnp.clip(at, 0, rows - 1), axis=2)
        found = jnp.take_along_axis(found, jnp.clip(at, 0, rows - 1), axis=2)
        return jnp.where((view.pos >= 0) & (written == view.pos), found, 0.0)

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return (pos >= 0) & (pos >= length[:, None, None] - protected_share(self.window, budget))

    def _predicted(self, layer: jax.Array, x: jax.Array, config: ModelConfig) -> jax.Array:
        """Log-scores [B, P, K] of rows of one layer, from what its attention reads [B, P, D]."""
        surrogate = self._surrogate(config)
        return predict({name: a[layer] for name, a in surrogate.items()}, x)

    def _surrogate(self, config: ModelConfig) -> dict[str, jax.Array]:
        found = _load(self.file)
        width = found["weight"].shape[1] if HIDDEN[0] in found else config.hidden_size
        sizes = dict(L=config.num_layers, D=config.hidden_size, K=config.num_kv_heads, F=width)
        for name, tensor in found.items():
            expected = tuple(sizes[letter] for letter in LETTERS[name])
            check_shape(self.file, COMMAND, name, tensor, expected)
        return {name: jnp.asarray(tensor) for name, tensor in found.items()}


def predict(surrogate: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Log-scores float32 [..., K] of one layer from what its attention reads, [..., D]."""
    h = x.astype(jnp.float32)
    if HIDDEN[0] in surrogate:
        h = jax.nn.gelu(_affine(h, surrogate["hidden_weight"], surrogate["hidden_bias"]))
    return _affine(h, surrogate["weight"], surrogate["bias"])


def _affine(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    return x @ weight + bias.reshape(*[1] * (x.ndim - 1), -1)


def _load(file: str) -> dict[str, np.ndarray]:
    return load_statistics(file, COMMAND, HIDDEN, **LETTERS)
