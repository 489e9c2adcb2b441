"""Scores of given tokens by a policy or a model; nothing is generated."""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.generation.inputs import DEFAULT_BUDGET, announce, default_policy
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, embed, forward, logits
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params
from lookahead_jax.model.sharding import on_its_mesh
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.policies.base import Policy, check_positions
from lookahead_jax.prefilling.batching import bucket_length, check_tokens
from lookahead_jax.prefilling.diagnosis import non_finite_error
from lookahead_jax.prefilling.layer_pass import hidden_states
from lookahead_jax.prompts.kvzip_replay import repeat_template
from lookahead_jax.prompts.read import read_prompt


class Scored(NamedTuple):
    """A policy's scores of every prompt entry."""

    scores: jax.Array  # [L, B, K, T] float32; 0 for entries that were cut while the prompt was read
    kept: jax.Array  # [L, B, K, C] int32 ascending positions, -1 padded
    logits: jax.Array  # [B, V] float32 after the last prompt token


@on_its_mesh
def score(
    model: Model,
    tokens: np.ndarray,
    *,
    policy: Policy | None = None,
    budget: int = DEFAULT_BUDGET,
    lookahead: LookaheadModules | None = None,
) -> Scored:
    """Scores every prompt entry and selects `budget` per layer and KV head; decodes nothing.

    `tokens` is int32 [B, T], right-padded with -1. Raises ValueError for other arrays, ids out of
    range, a policy without its modules, and one that observes with a draft (speckv);
    NonFiniteError, naming the first layer at fault, for logits that are NaN or infinite.
    """
    check_tokens(tokens, config=model.config)
    policy = policy or default_policy(lookahead)
    check_positions(policy, "score")
    announce(policy, budget, tokens.shape[1], model.config)
    width = tokens.shape[1]
    padded = np.full((len(tokens), bucket_length(width)), -1, np.int32)
    padded[:, :width] = tokens
    result = read_prompt(
        model.params, jnp.asarray(padded), config=model.config, policy=policy, budget=budget,
        new_tokens=0, modules=lookahead, eos_ids=model.generation.eos_ids, with_scores=True,
        repeat_template=repeat_template(policy, model.tokenizer),
    )  # fmt: skip
    for i in np.flatnonzero(~np.isfinite(np.asarray(result.logits)).all(-1)).tolist():
        row = tokens[i][tokens[i] >= 0].tolist()
        raise non_finite_error(model.params, row, f"row {i}", config=model.config)
    # What comes after a prompt is a memory of the modules.
    pos, lengths = np.asarray(result.cache.pos), (tokens >= 0).sum(1, dtype=np.int32)
    of_prompt = (pos >= 0) & (pos < lengths[None, :, None, None])
    kept = np.where(of_prompt, pos, -1)[..., : int(of_prompt.sum(-1).max())]
    scores = cast(jax.Array, result.scores)  # asked for
    return Scored(scores[..., :width], jnp.asarray(kept), result.logits)


def token_logits(
    params: Params, tokens: Int[Array, "B T"], *, config: ModelConfig
) -> Float[Array, "B T V"]:
    """Float32 next-token logits at every position of a right-padded batch; keeps no cache."""
    return logits(params, hidden_states(params, tokens, config=config), config=config)


@program(static_argnames=("config",))
def forced_logits(
    params: Params,
    cache: KVCache,
    first: Float[Array, "B V"],
    forced: Int[Array, "B Y"],
    *,
    config: ModelConfig,
) -> Float[Array, "B Y V"]:
    """Float32 logits that predict every token of `forced`, read after a cache, which is kept.

    `forced` is right-padded with -1, `first` holds the logits after the cache's last token. If each
    forced token has the largest logit, greedy decoding emits exactly these tokens.
    """
    step = jnp.arange(forced.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(forced >= 0, cache.next_pos[:, None] + step, -1)
    block = Block(embed(params, forced, config=config), positions, cache.rope_span)
    out = forward(params, block, cache, config=config)
    rest = logits(params, out.hidden[:, :-1], config=config)
    return jnp.concatenate([first[:, None], rest], axis=1)
