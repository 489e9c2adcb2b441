"""One training step of the denoiser's head: masked denoising of blocks of a model's responses.

A random part of each block is given and the head predicts the rest, so that drafting can fill a
block in one pass or in several. Tokens near the root weigh more, as in the second stage of DEER
(arXiv 2512.15176). B rows, T tokens of a text, A places of a text, K tokens of a block, D model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params
from lookahead_jax.modules.denoiser import (
    DenoiserHead,
    DenoiserHeadConfig,
    block_logits,
    place_in,
    target_tables,
)
from lookahead_jax.prefilling.batching import bucket_length
from lookahead_jax.prefilling.layer_pass import hidden_states
from lookahead_jax.train.batches import Batch
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.step import StepMetrics, TrainState, next_state

_ALL_MASKED = 0.5  # of the blocks; the first pass of drafting sees no other


class Texts(NamedTuple):
    """Prompts with their responses."""

    tokens: jax.Array  # [B, T] int32, padded with -1
    first: jax.Array  # [B] int32 where the response begins


def texts_of(batch: Batch) -> Texts:
    """The rows of a batch that is one micro-batch.

    Their width has a bucket of its own: those of prompt and response make too many pairs to compile
    a step for each.
    """
    prompts, responses = np.asarray(batch.prompts)[0], np.asarray(batch.responses)[0]
    first, more = (prompts >= 0).sum(1), (responses >= 0).sum(1)
    tokens = np.full((len(prompts), bucket_length(int((first + more).max()))), -1, np.int32)
    for i, text in enumerate(tokens):
        text[: first[i]] = prompts[i, : first[i]]
        text[first[i] : first[i] + more[i]] = responses[i, : more[i]]
    return Texts(jnp.asarray(tokens), jnp.asarray(first, jnp.int32))


def denoising_loss(
    head: DenoiserHead,
    tables: Params,
    hidden: Float[Array, "B T D"],
    texts: Texts,
    key: jax.Array,
    *,
    config: ModelConfig,
    places: int,
    decay: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross entropy of the masked tokens at random places, and the mean draft accepted there.

    `hidden` is what the base model makes of the texts. A place is the position of a last accepted
    token; the token after it, of the response, is the root. Half of the blocks are masked as a
    whole, in the others each token with a probability drawn for the block. The second result is the
    mean number of leading tokens that the head predicts in the blocks masked as a whole.
    """
    tokens, first = texts
    size, width = head.config.tokens, tokens.shape[1]
    where, whole, some, each = jax.random.split(key, 4)
    index = jnp.arange(width, dtype=jnp.int32)[None]
    length = (tokens >= 0).sum(1, dtype=jnp.int32)[:, None]
    possible = (index >= first[:, None] - 1) & (index + 2 < length)
    # Impossible places come last.
    drawn = jnp.where(possible, jax.random.uniform(where, tokens.shape), -1.0)
    chance, at = jax.lax.top_k(drawn, min(places, width))
    batch, count = at.shape

    def after(offsets: jax.Array) -> jax.Array:
        """The tokens at the offsets from every place [B, A, n], -1 past the end of a row."""
        positions = (at[..., None] + offsets[None, None]).reshape(batch, -1)
        padded = jnp.pad(tokens, [(0, 0), (0, size + 2)], constant_values=-1)
        return jnp.take_along_axis(padded, positions, axis=1).reshape(batch * count, -1)

    root = after(jnp.ones(1, jnp.int32))[:, 0]
    block = after(2 + jnp.arange(size, dtype=jnp.int32))
    rate = jax.random.uniform(some, (batch * count, 1))
    all_masked = jax.random.uniform(whole, rate.shape) < _ALL_MASKED
    masked = all_masked | (jax.random.uniform(each, block.shape) < rate)
    states = jnp.take_along_axis(hidden, at[..., None], axis=1).reshape(batch * count, -1)
    given = jnp.where(masked, -1, block)
    out = block_logits(head, tables, states, jnp.maximum(root, 0), given, config=config)
    there = (block >= 0) & (chance.reshape(-1, 1) >= 0)
    target = place_in(head.vocabulary, block)
    wanted = jnp.take_along_axis(out, jnp.maximum(target, 0)[..., None], axis=2)[..., 0]
    losses = jax.nn.logsumexp(out, axis=-1) - wanted
    importance = decay ** jnp.arange(size, dtype=jnp.float32)[None]
    weights = jnp.where(there & masked & (target >= 0), importance, 0.0)
    loss = (losses * weights).sum() / jnp.maximum(weights.sum(), 1e-6)
    right = jnp.cumprod(there & (out.argmax(-1) == target), axis=1, dtype=jnp.float32).sum(1)
    counted = (all_masked & there)[:, 0].astype(jnp.float32)
    return loss, (right * counted).sum() / jnp.maximum(counted.sum(), 1.0)


_STATIC = ("sizes", "config", "optimizer", "total", "places", "decay")


@program(static_argnames=_STATIC, donate_argnames=("state",))
def denoiser_step(
    params: Params,
    vocabulary: jax.Array | None,
    state: TrainState,
    texts: Texts,
    key: jax.Array,
    *,
    sizes: DenoiserHeadConfig,
    config: ModelConfig,
    optimizer: OptimizerConfig,
    total: int,
    places: int,
    decay: float,
) -> tuple[TrainState, StepMetrics]:
    """One update of `total`; skipped where loss or gradient is not finite. The state is donated.

    `state.modules` are the parameters of a head with this `vocabulary` and these `sizes`. The other
    arguments are those of `denoising_loss`.
    """
    hidden = hidden_states(params, texts.tokens, config=config)
    tables = target_tables(params, vocabulary, config=config)

    def loss_of(trained: Params) -> tuple[jax.Array, jax.Array]:
        head = DenoiserHead(trained, vocabulary, sizes)
        return denoising_loss(
            head, tables, hidden, texts, key, config=config, places=places, decay=decay
        )

    (loss, accepted), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.modules)
    state, metrics = next_state(state, make_optimizer(optimizer, total), loss, gradient)
    return state, metrics | {"accepted": accepted}
