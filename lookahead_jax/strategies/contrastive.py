"""Contrastive search: likely tokens whose hidden states are unlike those of the text so far."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.decoding.state import DecodeState, emit
from lookahead_jax.decoding.tree import Accepted
from lookahead_jax.model.cache import Entries, commit
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, embed, forward, logits
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params
from lookahead_jax.prefilling.batching import pad_batch
from lookahead_jax.prefilling.layer_pass import hidden_states
from lookahead_jax.strategies.base import Ranked, Strategy, check_at_least
from lookahead_jax.strategies.rows import Rows


class Memory(NamedTuple):
    """What the search knows besides the decoding state, in which no token is pending."""

    logits: jax.Array  # [B, V] float32 after the last token
    hidden: jax.Array  # [B, W, D] float32 hidden states of the text, of length 1
    length: jax.Array  # [B] int32 how many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrastive(Strategy):
    """Of the `k` likeliest tokens v the one with the largest (1 - alpha) p(v) - alpha s(v).

    s(v) is the largest cosine between the hidden state of v and those of the text, prompt included
    (Su et al. 2022, arXiv:2202.06417, equation 5). The candidates are read as a tree of k siblings
    in one step. Hidden states of the prompt come from a second pass that evicts nothing.
    """

    k: int = 4
    alpha: float = 0.6

    def __post_init__(self) -> None:
        check_at_least("k", self.k, 1)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is not possible: give 0 to 1")

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        config, params = rows.model.config, rows.model.params
        if self.k > config.vocab_size:
            raise ValueError(f"k={self.k} is more than the vocabulary: lower it")
        tokens = jnp.asarray(pad_batch(rows.texts, config=config))
        room = ((0, 0), (0, rows.state.tokens.shape[1]), (0, 0))
        memory = Memory(
            rows.logits,
            jnp.pad(_unit(hidden_states(params, tokens, config=config)), room),
            (tokens >= 0).sum(1, dtype=jnp.int32),
        )
        # The search chooses the first token itself, and reads each token in the step that does.
        rows.replace(
            dataclasses.replace(
                rows.state,
                tokens=jnp.full_like(rows.state.tokens, -1),
                count=jnp.zeros_like(rows.state.count),
                done=jnp.zeros_like(rows.state.done),
            )
        )
        while rows.running.any():

            def move(params: Params, state: DecodeState) -> DecodeState:
                nonlocal memory
                state, memory = _step(params, state, memory, config=config, settings=self)
                return state

            rows.step(move)
        return [Ranked(0, [None]) for _ in rows.groups]


def _unit(hidden: jax.Array) -> jax.Array:
    hidden = hidden.astype(jnp.float32)
    return hidden / jnp.maximum(jnp.linalg.norm(hidden, axis=-1, keepdims=True), 1e-12)


@program(static_argnames=("config", "settings"), donate_argnames=("state", "memory"))
def _step(
    params: Params,
    state: DecodeState,
    memory: Memory,
    *,
    config: ModelConfig,
    settings: Contrastive,
) -> tuple[DecodeState, Memory]:
    cache, live = state.cache, ~state.done
    p, ids = jax.lax.top_k(jax.nn.softmax(memory.logits), settings.k)
    x = embed(params, ids, config=config)
    positions = jnp.broadcast_to(cache.next_pos[:, None], ids.shape)
    siblings = jnp.broadcast_to(jnp.eye(settings.k, dtype=bool), (*ids.shape, settings.k))
    out = forward(params, Block(x, positions, cache.rope_span, siblings), cache, config=config)
    hidden = _unit(out.hidden)
    cosines = jnp.einsum("bkd,bwd->bkw", hidden, memory.hidden)
    known = jnp.arange(memory.hidden.shape[1])[None, None] < memory.length[:, None, None]
    penalty = jnp.where(known, cosines, -jnp.inf).max(-1)
    best = jnp.argmax((1 - settings.alpha) * p - settings.alpha * penalty, axis=1)[:, None]

    def chosen(a):
        return jnp.take_along_axis(a, best.reshape(-1, 1, *[1] * (a.ndim - 2)), axis=1)

    count = live.astype(jnp.int32)
    path = jnp.broadcast_to(best.astype(jnp.int32), ids.shape)
    cache = commit(cache, Entries(out.k, out.v, positions, path, count, out.k_scale, out.v_scale))
    rows = jnp.arange(count.shape[0])
    at = jnp.where(live, memory.length, memory.hidden.shape[1])
    memory = Memory(
        logits(params, chosen(out.hidden), config=config)[:, 0],
        memory.hidden.at[rows, at].set(chosen(hidden)[:, 0], mode="drop"),
        memory.length + count,
    )
    finite = jnp.isfinite(memory.logits).all(-1) | ~live
    state = dataclasses.replace(state, cache=cache, finite=state.finite & finite)
    return emit(state, Accepted(path[:, :1], count, chosen(ids)), None), memory
