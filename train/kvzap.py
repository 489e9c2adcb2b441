"""Train the surrogate of the policy kvzap for a model, from texts (KVzap, arXiv 2601.07891).

    lookahead train kvzap --model DIR --text FILE ... --out KVZAP.safetensors
    lookahead generate --model DIR --policy kvzap --policy-arg file=KVZAP.safetensors ...

The model reads each window of the texts three times: as it is for its hidden states, and twice with
kvzip+, whose scores are the targets, of all layers at once. A linear surrogate is the least-squares
solution over all windows; with `--hidden`, a network with one hidden layer takes steps of Adam on
each. Every eighth window is left out, to say how well the surrogate predicts. After Ctrl-C the file
holds what the windows so far have given.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm import tqdm

from lookahead_jax import EMBEDDED_MODEL
from lookahead_jax.checkpoints.load import Model, load
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.integers import check_integer
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.jit import program
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.kvzap import LETTERS, predict
from lookahead_jax.policies.kvzip import KVzipPlus
from lookahead_jax.policies.view import Chunk
from lookahead_jax.prompts.kvzip_replay import repeat_template
from lookahead_jax.prompts.read import read_prompt
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.progress import say
from lookahead_jax.train.query_statistics import (
    StatisticsConfig,
    query_statistics,
    windows_of,
    write_statistics,
)
from lookahead_jax.train.stopping import stop_requests

_LEAST = 1e-6  # of a score; the logarithms of smaller ones would rule the loss
_RIDGE = 1e-4  # of the mean square of a feature
_HELD_OUT = 8  # one window in so many
_STEPS = 4  # of Adam on each window

Weights = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SurrogateConfig(StatisticsConfig):
    """Train the surrogate of the policy kvzap from texts."""

    hidden: int = 0
    """Width of the hidden layer; 0: a linear surrogate. The source takes an eighth of the
    model's."""
    rate: float = 1e-3
    """Peak learning rate, with a hidden layer."""
    seed: int = 0
    """Seed of the first weights, with a hidden layer."""

    def __post_init__(self) -> None:
        check_integer("--hidden", self.hidden, least=0)
        for name in ("length", "windows"):
            check_integer(f"--{name}", getattr(self, name), least=1)
        if not 0 < self.rate < float("inf"):
            raise ValueError(f"--rate {self.rate} must be a positive number")


@dataclasses.dataclass(frozen=True)
class _Inputs(Policy):
    """Gathers what the attention of each layer reads."""

    def init_stats(self, batch: int, tokens: int, config: ModelConfig) -> jax.Array:
        return jnp.zeros((batch, tokens, config.hidden_size), jnp.float32)

    def accumulate(self, stats: jax.Array, chunk: Chunk) -> jax.Array:
        x = chunk.x.astype(jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(stats, x, chunk.end - x.shape[1], axis=1)


def samples(model: Model, window: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Inputs float32 [L, T, D] and targets float32 [L, T, K] of the tokens of a window."""
    tokens, count = jnp.asarray(window[None]), int((window >= 0).sum())
    inputs = query_statistics(model.params, tokens, policy=_Inputs(), config=model.config)
    teacher = KVzipPlus()
    scores = read_prompt(
        model.params, tokens, config=model.config, policy=teacher, budget=len(window),
        new_tokens=0, with_scores=True,
        repeat_template=repeat_template(teacher, model.tokenizer),
    ).scores  # fmt: skip
    if scores is None:
        raise ValueError("kvzip+ has returned no scores")
    targets = jnp.log(jnp.maximum(scores[:, 0].swapaxes(1, 2), _LEAST))
    return inputs[:, 0, :count], targets[:, :count]


class Learner(Protocol):
    """What learns a surrogate from one window after another."""

    def learn(self, x: jax.Array, y: jax.Array) -> None:
        """Takes in the samples [L, T, D] and [L, T, K] of a window."""
        ...

    def weights(self) -> Weights:
        """The surrogate so far; ValueError before the first window."""
        ...


class LeastSquares:
    """The linear surrogate, by sums of products in float64 on the host."""

    def __init__(self) -> None:
        self._sums: tuple[np.ndarray, np.ndarray] | None = None

    def learn(self, x: jax.Array, y: jax.Array) -> None:
        """Takes in a window."""
        square, product = (np.asarray(a, np.float64) for a in _products(x, y))
        if self._sums is not None:
            square += self._sums[0]
            product += self._sums[1]
        self._sums = square, product

    def weights(self) -> Weights:
        """The solution with a little ridge; the bias has none."""
        if self._sums is None:
            raise ValueError("a surrogate needs at least one window of text")
        square, product = self._sums
        ridge = np.diagonal(square, axis1=1, axis2=2)[:, :-1].mean(-1) * _RIDGE
        shrink = np.append(np.ones(square.shape[-1] - 1), 0.0)
        found = np.linalg.solve(square + ridge[:, None, None] * np.diag(shrink), product)
        found = found.astype(np.float32)
        return {"weight": jnp.asarray(found[:, :-1]), "bias": jnp.asarray(found[:, -1])}


@program()
def _products(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """X'X [L, D+1, D+1] and X'Y [L, D+1, K], where the last feature is 1."""
    x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
    return jnp.einsum("ltd,lte->lde", x, x), jnp.einsum("ltd,ltk->ldk", x, y)


class Network:
    """The surrogate with a hidden layer, by steps of Adam; all layers of the model at once."""

    def __init__(self, config: SurrogateConfig, windows: int) -> None:
        self._config = config
        rate = OptimizerConfig(rate=config.rate, warmup=0)
        self._optimizer = make_optimizer(rate, _STEPS * windows)
        self._state: tuple[Weights, optax.OptState] | None = None

    def learn(self, x: jax.Array, y: jax.Array) -> None:
        """Takes some steps on a window."""
        if self._state is None:
            first = self._first(x, y)
            self._state = first, self._optimizer.init(first)
        weights, state = self._state
        for _ in range(_STEPS):
            weights, state = _step(weights, state, x, y, optimizer=self._optimizer)
        self._state = weights, state

    def weights(self) -> Weights:
        """The weights after the last step."""
        if self._state is None:
            raise ValueError("a surrogate needs at least one window of text")
        return self._state[0]

    def _first(self, x: jax.Array, y: jax.Array) -> Weights:
        (layers, _, width), hidden = x.shape, self._config.hidden
        key = jax.random.key(self._config.seed)
        into = jax.random.normal(key, (layers, width, hidden), jnp.float32)
        # Hidden units of about unit size, whatever the size of the features of a layer.
        size = jnp.sqrt((x * x).sum(-1).mean(1))[:, None, None]
        return {
            "hidden_weight": into / jnp.maximum(size, 1e-6),
            "hidden_bias": jnp.zeros((layers, hidden), jnp.float32),
            "weight": jnp.zeros((layers, hidden, y.shape[-1]), jnp.float32),
            "bias": y.mean(1),
        }


@program(static_argnames=("optimizer",))
def _step(
    weights: Weights,
    state: optax.OptState,
    x: jax.Array,
    y: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
) -> tuple[Weights, optax.OptState]:
    """One step of Adam on the mean square error, of every layer for itself."""

    def loss(weights: Weights) -> jax.Array:
        return ((jax.vmap(predict)(weights, x) - y) ** 2).mean((1, 2)).sum()

    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
    return cast(Weights, optax.apply_updates(weights, updates)), state


def explained(weights: Weights, held_out: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Share of the variance of the targets that the surrogate explains, by layer [L]."""
    targets = np.concatenate([y for _, y in held_out], axis=1)
    error = sum(
        np.square(np.asarray(jax.vmap(predict)(weights, jnp.asarray(x))) - y).sum((1, 2))
        for x, y in held_out
    )
    variance = np.square(targets - targets.mean(1, keepdims=True)).sum((1, 2))
    return 1.0 - error / np.maximum(variance, 1e-12)


def train_surrogate(config: SurrogateConfig) -> None:
    """Trains the surrogate and writes it to `config.out`."""
    say(f"loading {config.model or 'the embedded model'}")
    model = load(config.model or EMBEDDED_MODEL, dtype=config.dtype)
    windows = windows_of(model, config.text, length=config.length, most=config.windows)
    learner: Learner = Network(config, len(windows)) if config.hidden else LeastSquares()
    held_out = []
    with stop_requests() as stop_requested:
        for i, window in enumerate(tqdm(windows, unit=" windows", desc="reading")):
            x, y = samples(model, window)
            if i % _HELD_OUT == _HELD_OUT - 1:
                held_out.append((np.asarray(x), np.asarray(y)))
            else:
                learner.learn(x, y)
            if stop_requested(i):
                say(f"stopped after window {i + 1} of {len(windows)}")
                break
    weights = learner.weights()
    found = {name: np.asarray(weights[name]) for name in LETTERS if name in weights}
    write_statistics(config, model, **found)
    if held_out:
        share = explained(weights, held_out)
        say(
            f"explains {share.mean():.2f} of the variance in windows left out (layers "
            f"{share.min():.2f} to {share.max():.2f})"
        )


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    prog = "lookahead train kvzap"
    return run_command(
        lambda: tyro.cli(SurrogateConfig, args=args, prog=prog), train_surrogate, prog=prog
    )


if __name__ == "__main__":
    end_process(main())
