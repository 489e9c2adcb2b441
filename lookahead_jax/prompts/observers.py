"""The rows after a prompt that score its entries: lookahead tokens, its last tokens, a draft.

Letters: B batch, T prompt, Y response.
"""

import jax
import jax.numpy as jnp

from lookahead_jax.drafters.prompt_lookup import continuation
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, embed
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params
from lookahead_jax.modules.definition import LookaheadModules, observer_block
from lookahead_jax.policies.base import Policy, WithDraft, WithLookup, WithModules


def observer_of(
    params: Params,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    policy: Policy,
    budget: int,
    known_tokens: int | jax.Array = 0,
    modules: LookaheadModules | None = None,
    draft: jax.Array | None = None,
) -> Block | None:
    """The rows behind prompts [B, T] that a policy scores with; None if it needs none.

    Raises ValueError for a policy without the modules or the draft that it needs.
    """
    length = (tokens >= 0).sum(1, dtype=jnp.int32)
    span = length + known_tokens
    match policy.reading:
        case WithModules():
            if modules is None:
                raise ValueError(
                    f"policy {type(policy).__name__} reads lookahead modules: give them "
                    "(modules=, lookahead=, or --lookahead)"
                )
            return observer_block(modules, length, span, dtype=params["embed"].dtype)
        case WithDraft() as reading:
            draft = _given(draft, policy, reading)
        case WithLookup() as reading:
            draft = look_up(tokens, reading)
        case _:
            return None
    return reread(
        params, tokens, rows=policy.window_rows(budget), response=draft, length=length, span=span,
        config=config,
    )  # fmt: skip


def _given(draft: jax.Array | None, policy: Policy, reading: WithDraft) -> jax.Array:
    if draft is None:
        given = "give drafts=, answers drafted by a small model"
        if reading.by_drafter:
            given = "use draft=prompt or draft=model, which need none, or give drafts="
        raise ValueError(f"policy {type(policy).__name__} needs a draft per prompt: {given}")
    return draft


@program(static_argnames=("reading",))
def look_up(tokens: jax.Array, reading: WithLookup) -> jax.Array:
    """The draft that each prompt of `tokens` [B, T] holds of its answer: int32 [B, Y], -1 padded.

    It is what followed an earlier occurrence of the prompt's end.
    """
    length = (tokens >= 0).sum(1, dtype=jnp.int32)
    return continuation(
        tokens, length, ngram=reading.ngram, tokens=reading.tokens, least=reading.least
    )


def read_again(
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    *,
    rows: int,
    response: jax.Array | None,
    config: ModelConfig,
) -> Block:
    """`reread` after a cache that holds the prompts."""
    return reread(
        params, tokens, rows=rows, response=response, length=cache.next_pos,
        span=cache.rope_span, config=config,
    )  # fmt: skip


def reread(
    params: Params,
    tokens: jax.Array,
    *,
    rows: int,
    response: jax.Array | None,
    length: jax.Array,
    span: jax.Array,
    config: ModelConfig,
) -> Block:
    """The last `rows` tokens of each prompt, then `response` [B, Y], as rows over all its entries.

    The entries hold the keys of these `rows` tokens already, so the block's rows see them there
    and not in the block.
    """
    first = length[:, None] - rows
    positions = first + jnp.arange(rows, dtype=jnp.int32)[None]
    ids = jnp.take_along_axis(tokens, jnp.maximum(positions, 0), axis=1)
    ids = jnp.where(positions >= 0, ids, -1)
    if response is not None:
        ids = jnp.concatenate([ids, response], axis=1)
    step = jnp.arange(ids.shape[1], dtype=jnp.int32)
    return Block(
        x=embed(params, ids, config=config),
        positions=jnp.where(ids >= 0, first + step[None], -1),
        rope_span=span,
        visible=jnp.broadcast_to((step >= rows)[None, None], (*ids.shape, ids.shape[1])),
    )
