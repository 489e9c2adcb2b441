"""How likely the tokens of each row were, kept while they are drawn."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.decoding.sampling import Sampling, TextSoFar, process_logits, sampling_rows


class Likelihood(NamedTuple):
    """What a row's tokens were drawn from."""

    log_p: jax.Array  # [B, V] float32 of the last distribution
    total: jax.Array  # [B] float32 log-probability of a trial's tokens, all but the last one


@dataclasses.dataclass(frozen=True)
class Listen:
    """Changes no logits, and adds up the log-probabilities of the tokens."""

    sampling: Sampling

    def __call__(
        self, state: Likelihood, logits: jax.Array, last: jax.Array
    ) -> tuple[Likelihood, jax.Array]:
        log_p = log_distribution(logits, self.sampling)
        return Likelihood(log_p, state.total + taken(state, last)), logits


def log_distribution(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """What `sampling` draws from after raw `logits` [B, V], without penalties on the text."""
    rows, vocab = logits.shape
    settings = sampling_rows([sampling] * rows, [0] * rows, vocab)
    processed = process_logits(logits[:, None], TextSoFar(None, None), settings)[:, 0]
    return jax.nn.log_softmax(processed)


def taken(state: Likelihood, tokens: jax.Array) -> jax.Array:
    """Log-probability [B] of each row's token in its last distribution."""
    return jnp.take_along_axis(state.log_p, tokens[:, None], axis=1)[:, 0]


def nothing_drawn(rows: int, vocab_size: int) -> Likelihood:
    """The state before the first token."""
    return Likelihood(jnp.zeros((rows, vocab_size)), jnp.zeros(rows))


@jax.jit
def log_probability(state: Likelihood, token: jax.Array) -> jax.Array:
    """Of all the tokens [B], the last one, `token`, included."""
    return state.total + taken(state, token)
