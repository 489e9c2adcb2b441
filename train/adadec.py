"""Learn for a model the entropy from which the strategy adadec looks ahead.

    lookahead train adadec --model DIR --source FILE ...
    lookahead generate --model DIR --strategy adadec --strategy-arg threshold=VALUE ...

The model reads prompts with good answers. Where the next token of an answer is not its first
choice, a look ahead might help; a logistic regression predicts that from the entropy alone.
(AdaDec: He et al. 2025, arXiv:2506.08980. Split, balance, regression and choice of the probability
are those of their code.)
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import tyro
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from lookahead_jax import EMBEDDED_MODEL
from lookahead_jax.checkpoints.load import Model, load
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import logits
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params
from lookahead_jax.prefilling.batching import bucket_length
from lookahead_jax.prefilling.layer_pass import hidden_states
from lookahead_jax.train.data import read_sources, tokenize
from lookahead_jax.train.progress import say

_HELD_OUT = 0.2  # of the tokens
_AT_A_TIME = 64  # positions whose logits exist together


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThresholdConfig:
    """Learn for a model the entropy from which the strategy adadec looks ahead."""

    source: tuple[str, ...]
    """JSON lines or parquet files, or hf:owner/name, as of `lookahead train data`: rows have
    `messages` that end with an answer, or `prompt` and `response`. Chats without an answer are
    left out."""
    model: Path | None = None
    """Folder of the model. Default: the embedded model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; None: that of the checkpoint."""
    limit: int = 1000
    """Most rows to read."""
    max_tokens: int = 2048
    """Longest prompt and answer together; longer rows are cut at the end."""
    seed: int = 0
    """Chooses the tokens that are held out, and those that balance the others."""


class Learned(NamedTuple):
    """A threshold, and how well it is known."""

    threshold: float  # nats, at least 0
    accuracy: float  # on tokens held out, of saying whether a token is the model's first choice
    tokens: int  # of answers


def learn_threshold(entropy: np.ndarray, chosen: np.ndarray, *, seed: int = 0) -> Learned:
    """The entropy that best separates the tokens `chosen` [n] bool by a model from the others.

    `entropy` [n] are those of its distributions, in nats. A fifth of the tokens is held out; of the
    others, equally many of both kinds fit the regression, with sklearn's default penalty. The
    probability, a multiple of 0.01, by which a token counts as chosen is the most accurate on the
    tokens held out. Raises ValueError where all tokens are of one kind, or where chosen tokens do
    not have less entropy.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(entropy))
    held, rest = np.split(order, [int(np.ceil(_HELD_OUT * len(order)))])
    kinds = [rest[chosen[rest]], rest[~chosen[rest]]]
    few = min(map(len, kinds))
    if few == 0:
        which = "none" if len(kinds[1]) else "all"
        raise ValueError(
            f"{which} of {len(rest)} tokens are the model's first choice: give more answers"
        )
    balanced = np.concatenate([rng.choice(kind, few, replace=False) for kind in kinds])
    slope, intercept = logistic_fit(entropy[balanced], chosen[balanced])
    if slope >= 0:
        raise ValueError("the model's entropy does not say where it is wrong: give more answers")
    chance = 1 / (1 + np.exp(-(slope * entropy[held] + intercept)))
    least = np.arange(1, 100) / 100
    accuracy = ((chance >= least[:, None]) == chosen[held]).mean(1)
    best = least[accuracy.argmax()]
    threshold = (np.log(best / (1 - best)) - intercept) / slope
    return Learned(max(float(threshold), 0.0), float(accuracy.max()), len(entropy))


def logistic_fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of a logistic regression of y [n] bool on x [n]; slope ** 2 / 2 is added
    to the sum of the losses."""
    sign = np.where(y, 1.0, -1.0)

    def loss(line: np.ndarray) -> tuple[float, np.ndarray]:
        z = sign * (line[0] * x + line[1])
        pull = -sign * np.exp(-np.logaddexp(0, z))
        value = np.logaddexp(0, -z).sum() + line[0] ** 2 / 2
        return float(value), np.array([pull @ x + line[0], pull.sum()])

    found = scipy.optimize.minimize(loss, np.zeros(2), jac=True, method="BFGS")
    return float(found.x[0]), float(found.x[1])


@program(static_argnames=("config",))
def entropies(
    params: Params, tokens: Int[Array, "1 T"], *, config: ModelConfig
) -> tuple[Float[Array, " T"], Bool[Array, " T"]]:
    """The entropy after each token of a padded text, and whether the next one is likeliest."""
    hidden = hidden_states(params, tokens, config=config)[0]

    def at(place: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h, following = place
        log_p = jax.nn.log_softmax(logits(params, h[None, None], config=config)[0, 0])
        return -(jnp.exp(log_p) * log_p).sum(), log_p.argmax() == following

    following = jnp.roll(tokens[0], -1)
    return jax.lax.map(at, (hidden, following), batch_size=_AT_A_TIME)


def read_answers(
    model: Model, rows: Iterable[tuple[list[int], list[int]]], *, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Entropies [n] before the tokens of all answers, and whether the model would choose these.

    `rows` are prompts and answers as token ids; those that leave no token of an answer are skipped.
    """
    found = [(np.zeros(0), np.zeros(0, bool))]
    for prompt, answer in rows:
        text = [*prompt, *answer][:max_tokens]
        if not prompt or len(text) <= len(prompt):
            continue
        tokens = np.full((1, bucket_length(len(text))), -1, np.int32)
        tokens[0, : len(text)] = text
        read = entropies(model.params, jnp.asarray(tokens), config=model.config)
        entropy, chosen = (np.asarray(a)[len(prompt) - 1 : len(text) - 1] for a in read)
        found.append((entropy.astype(np.float64), chosen))
    entropy, chosen = map(np.concatenate, zip(*found, strict=True))
    return entropy, chosen


def run(config: ThresholdConfig) -> None:
    """Prints the threshold."""
    if min(config.limit, config.max_tokens) < 1:
        raise ValueError(
            f"--limit {config.limit} and --max-tokens {config.max_tokens} must be at least 1"
        )
    say(f"loading {config.model or 'the embedded model'}")
    model = load(config.model or EMBEDDED_MODEL, dtype=config.dtype)
    rows = itertools.islice(read_sources(config.source), config.limit)
    pairs = (tokenize(row, model)[:2] for row in tqdm(rows, unit=" rows", desc="reading"))
    read = read_answers(model, pairs, max_tokens=config.max_tokens)
    if not read[0].size:
        raise ValueError(f"--source {' '.join(config.source)}: no row has an answer")
    learned = learn_threshold(*read, seed=config.seed)
    say(
        f"from {learned.tokens} tokens; right about {learned.accuracy:.1%} of those held out; "
        "the threshold:"
    )
    print(f"{learned.threshold:.6f}")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    prog = "lookahead train adadec"
    return run_command(lambda: tyro.cli(ThresholdConfig, args=args, prog=prog), run, prog=prog)


if __name__ == "__main__":
    end_process(main())
