"""KVzip's second pass: the context is read again after its own cache, in chunks."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.context import cache_context
from lookahead_jax.model.decoder import Block, embed, scan_layers
from lookahead_jax.model.jit import program
from lookahead_jax.model.layer_attention import layer_kinds
from lookahead_jax.model.params import Params
from lookahead_jax.model.rope import rope_tables
from lookahead_jax.policies.base import Policy, WithReplay
from lookahead_jax.policies.view import LayerView
from lookahead_jax.prefilling.layer_pass import observe_layer

REPEAT = "\n\nRepeat the previous context exactly."
REPEAT_FROM = "\n\nRepeat the part of the previous context exactly, starting with "
ANSWER = "\n\nAnswer: "  # begins the repetition where a model has no chat template
OVERLAP = 8  # tokens of the chunk before that the second request names


class RepeatTemplate(NamedTuple):
    """The token ids around the chunks when the model is asked to repeat them."""

    first: Sequence[int] = ()  # before the first chunk
    later: Sequence[int] = ()  # before the others; the end of the chunk before follows it
    answer: Sequence[int] = ()  # ends the request and begins the model's answer


NO_TEMPLATE = RepeatTemplate()


def repeat_template(policy: Policy, tokenizer: Tokenizer | None) -> RepeatTemplate:
    """KVzip's requests as token ids; a chat template supplies what follows the user's message.

    Empty without a tokenizer, and for policies that replay nothing.
    """
    if tokenizer is None or not isinstance(policy.reading, WithReplay):
        return NO_TEMPLATE
    answer = ANSWER
    if tokenizer.chat_templates:
        words = "user's words"
        chat = [{"role": "user", "content": words}]
        answer = tokenizer.render_chat(chat, enable_thinking=False).rpartition(words)[2]
    texts = (REPEAT, REPEAT_FROM, answer)
    return RepeatTemplate(*(tokenizer.encode(text, special=False) for text in texts))


@program(static_argnames=("config", "policy", "reading"))
def replay_scores(
    params: Params,
    cache: KVCache,
    block: Block,
    first: jax.Array,
    *,
    config: ModelConfig,
    policy: Policy,
    reading: WithReplay,
) -> jax.Array:
    """Scores of the chunk that begins at position `first`, float32 [L, B, K, S]; 0 elsewhere."""
    rope = rope_tables(config, block.positions, cache.rope_span)

    def step(rows, inputs):
        p, _, kind = inputs
        context = cache_context(cache, kind.index, params["embed"].dtype)
        residual = jnp.linalg.norm(rows.astype(jnp.float32), axis=-1)
        rows, queries = observe_layer(
            p, rows, block, rope, kind, context=context, lora=None, config=config
        )
        seen = _seen_by_chunk(context.pos, first, reading)
        view = LayerView.of(
            context._replace(pos=jnp.where(seen, context.pos, -1)), kind, length=cache.next_pos,
            span=cache.rope_span, config=config, sink_logits=p.get("sinks"), o=p["o"],
            queries=queries._replace(lse=None, residual=residual),
        )  # fmt: skip
        return rows, policy.score(view)

    return scan_layers(step, block.x, params["layers"], None, layer_kinds(config))[1]


def _seen_by_chunk(pos: jax.Array, first: jax.Array, reading: WithReplay) -> jax.Array:
    """Which entries the chunk from position `first` on scores: its own, and the sinks."""
    inside = (pos >= first) & (pos < first + reading.chunk)
    return inside | ((pos >= 0) & (pos < reading.sinks))


def _replay_block(
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    *,
    template: RepeatTemplate,
    first: int,
    size: int,
    config: ModelConfig,
) -> Block:
    """The request and a chunk of `size` tokens as rows after each context.

    Rows of the batch whose chunk is empty are padding.
    """

    def same(ids: Sequence[int]) -> jax.Array:  # [B, n] for all rows
        return jnp.broadcast_to(jnp.asarray(ids, jnp.int32)[None], (len(tokens), len(ids)))

    overlap = tokens[:, max(first - OVERLAP, 0) : first]
    chunk = tokens[:, first : first + size]
    chunk = jnp.pad(chunk, [(0, 0), (0, size - chunk.shape[1])], constant_values=-1)
    request = same(template.later if first else template.first)
    ids = jnp.concatenate([request, overlap, same(template.answer), chunk], axis=1)
    ids = jnp.where((chunk[:, :1] >= 0) & (ids >= 0), ids, -1)
    step = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(ids >= 0, cache.next_pos[:, None] + step, -1)
    return Block(embed(params, ids, config=config), positions, cache.rope_span)


def replay(
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    *,
    template: RepeatTemplate,
    config: ModelConfig,
    policy: Policy,
    reading: WithReplay,
) -> jax.Array:
    """Scores of every slot of a full cache, float32 [L, B, K, S], from replays of `tokens` [B, T].

    `reading` is that of `policy`. A slot keeps its largest score. Raises ValueError for T = 0.
    """
    reading = dataclasses.replace(reading, chunk=min(reading.chunk, tokens.shape[1]))
    scores = None
    for first in range(0, tokens.shape[1], reading.chunk):
        block = _replay_block(
            params, tokens, cache, template=template, first=first, size=reading.chunk,
            config=config,
        )  # fmt: skip
        new = replay_scores(
            params, cache, block, jnp.asarray(first, jnp.int32), config=config, policy=policy,
            reading=reading,
        )  # fmt: skip
        scores = new if scores is None else jnp.maximum(scores, new)
    if scores is None:
        raise ValueError("there is no context to replay")
    return scores
