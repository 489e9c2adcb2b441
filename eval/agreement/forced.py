"""A text that is forced through a full cache, and through caches that are cut while it is read.

Entries that a cut drops change the hidden states of what is read later, so masks on one full cache
(measure.py) cannot express it: the text is read again for each policy and budget, by the prefill
and the cuts of `lk.generate(..., evict_every=)`. Between cuts it is read in blocks.

Letters: B batch, L layers, K KV heads, S slots, Y answer, V vocabulary, D model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.eviction import DecodeEviction, evict, opening_question
from lookahead_jax.eval.agreement.measure import Agreement, agreement, f1_of
from lookahead_jax.eval.compare.masked import divergence
from lookahead_jax.generation.inputs import encode_batch
from lookahead_jax.generation.open_batch import pinned_positions, read_batch
from lookahead_jax.generation.settings import EvictionSettings
from lookahead_jax.model.cache import Entries, KVCache, commit
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, embed, forward, logits
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.policies.full import Full
from lookahead_jax.prefilling.batching import pad_batch
from lookahead_jax.prefilling.layer_pass import CHUNK

_TOGETHER = 64  # tokens of which logits exist at once; a padded length is a multiple, or less


class Forced(NamedTuple):
    """What a model expects at each token of an answer, behind a prompt."""

    first: jax.Array  # [1, V] float32 logits after the prompt
    hidden: jax.Array  # [1, Y, D] final-normed, after each token of the answer but the last


class Text(NamedTuple):
    """A prompt and its answer, under the full cache."""

    prompt: list[int]
    answer: list[int]
    own: bool  # whether the model itself wrote the answer, greedily on the full cache
    full: Forced


def read_text(
    model: Model, prompt: list[int], answer: list[int] | None, *, response_tokens: int
) -> Text:
    """A prompt and its answer on the full cache.

    Without an `answer` it is the model's own greedy one, of at most `response_tokens`.
    """
    written = answer
    if written is None:
        written = lk.generate(
            model, [prompt], policy=Full(), max_new_tokens=response_tokens
        ).tokens[0]  # fmt: skip
    full = forced(model, prompt, written, EvictionSettings(policy=Full(), budget=1))
    return Text(prompt, written, answer is None, full)


def forced_agreement(model: Model, text: Text, settings: EvictionSettings) -> Agreement:
    """The agreement with the full cache under `settings`, which may evict while decoding.

    Its means are over all tokens of the answer, those before the first cut included. F1 is that of
    the words which `lk.generate` writes under the same settings; None for an answer that the model
    has not written.
    """
    size = len(text.answer)
    cut = forced(model, text.prompt, text.answer, settings)
    kl, same = (np.asarray(a)[:size] for a in compare(model.params, text.full, cut, model.config))
    f1 = None
    if text.own:
        written = lk.generate(
            model, [text.prompt], policy=settings.policy, budget=settings.budget,
            lookahead=settings.modules, evict_every=settings.evict_every, max_new_tokens=size,
        ).tokens[0]  # fmt: skip
        f1 = f1_of(model, written, text.answer)
    return agreement(kl, same, f1)


def forced(
    model: Model, prompt: Sequence[int], answer: Sequence[int], settings: EvictionSettings
) -> Forced:
    """Reads the prompt as `settings` say, then the answer, with their cuts."""
    batch, eviction = encode_batch(model, [prompt], None), settings.while_decoding()
    tokens = jnp.asarray(pad_batch([answer], config=model.config))
    opened = read_batch(model, batch, settings, new_tokens=tokens.shape[1], eos_ids=())
    hidden = read_forced(
        model.params, opened.cache, opened.sums, tokens,
        pinned=pinned_positions(batch, settings), question=opening_question(eviction, batch.texts),
        modules=settings.modules, config=model.config, eviction=eviction,
    )  # fmt: skip
    return Forced(opened.logits, hidden)


@program(static_argnames=("config", "eviction"))
def read_forced(
    params: Params,
    cache: KVCache,
    sums: jax.Array | None,  # [L, B, K, S] float32, see eviction.opening_sums
    answer: jax.Array,  # [B, Y] int32, -1 padded
    *,
    pinned: jax.Array | None,  # [B, T] bool positions that every cut keeps
    question: jax.Array | None,  # [B, Q] int32, see eviction.opening_question
    modules: LookaheadModules | None,
    config: ModelConfig,
    eviction: DecodeEviction | None,
) -> jax.Array:
    """Hidden states [B, Y, D] after each token of an answer that is read behind the cache.

    A block ends where a row is due for a cut: at the same positions as in decoding. The last token
    is not read, because decoding does not read it either.
    """
    batch, most = answer.shape
    width = min(most, CHUNK if eviction is None else min(eviction.interval, CHUNK))
    total = jnp.maximum((answer >= 0).sum(1, dtype=jnp.int32) - 1, 0)
    row = jnp.arange(batch)[:, None]
    path = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (batch, width))

    def unfinished(carry):
        return (carry[2] < total).any()

    def step(carry):
        cache, sums, read, hidden = carry
        number = jnp.minimum(total - read, width)
        if eviction is not None:
            number = jnp.minimum(number, eviction.until_cut(cache.next_pos))
        there, at = path < number[:, None], read[:, None] + path
        ids = jnp.take_along_axis(answer, jnp.minimum(at, most - 1), axis=1)
        positions = jnp.where(there, cache.next_pos[:, None] + path, -1)
        block = Block(embed(params, ids, config=config), positions, cache.rope_span)
        out = forward(params, block, cache, config=config)
        hidden = hidden.at[row, jnp.where(there, at, most)].set(out.hidden, mode="drop")
        scales = out.k_scale, out.v_scale
        cache = commit(cache, Entries(out.k, out.v, positions, path, number, *scales))
        read = read + number
        if eviction is not None:
            cache, sums = evict(
                params, cache, sums, emitted=answer, count=read + 1, new=number,
                modules=modules, config=config, eviction=eviction, pinned=pinned, question=question,
            )  # fmt: skip
        return cache, sums, read, hidden

    hidden = jnp.zeros((batch, most, config.hidden_size), params["embed"].dtype)
    start = cache, sums, jnp.zeros(batch, jnp.int32), hidden
    return jax.lax.while_loop(unfinished, step, start)[3]


@program(static_argnames=("config",))
def compare(
    params: Params, full: Forced, cut: Forced, config: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """At each token of the answer, KL(full || cut) [Y] and whether the likeliest is the same [Y].

    Logits exist for a few tokens at a time only.
    """

    def measured(logits_full, logits_cut):
        kl = divergence(*(jax.nn.log_softmax(a, axis=-1) for a in (logits_full, logits_cut)))
        return kl, logits_full.argmax(-1) == logits_cut.argmax(-1)

    def chunk(hidden):
        return measured(*(logits(params, h[None], config=config)[0] for h in hidden))

    size = min(full.hidden.shape[1], _TOGETHER)

    def chunks(side):
        return side.hidden.reshape(-1, size, side.hidden.shape[-1])

    kl, same = jax.lax.map(chunk, (chunks(full), chunks(cut)))
    kl_first, same_first = measured(full.first, cut.first)
    # What is read last has nothing left to predict.
    kl, same = kl.reshape(-1)[:-1], same.reshape(-1)[:-1]
    return jnp.concatenate([kl_first, kl]), jnp.concatenate([same_first, same])
