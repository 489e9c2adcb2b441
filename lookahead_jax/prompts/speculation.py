"""A small model reads a prompt before the large one does: it drafts an answer or selects tokens.

SpecKV scores entries with the draft (policies/speckv.py); SpecPC drops prompt tokens by the small
model's attention. Source of both: arXiv 2506.08373 and its public code.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.host_drafter import Draft, HostDrafter
from lookahead_jax.decoding.step import decode
from lookahead_jax.kernels.common import softcap_logits, visible_by_position
from lookahead_jax.policies.base import Policy, WithDraft
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.view import LayerView
from lookahead_jax.prefilling.batching import pad_batch
from lookahead_jax.prompts.read import read_prompt

_READING = itertools.count(-1, -1)  # numbers of a drafter's requests that do not decode
_NODES = 8  # of a drafter's tree, for each token of the path that is taken from it


@dataclasses.dataclass(frozen=True, kw_only=True)
class TailAttention(Full):
    """Keeps everything and scores by the weighted attention of the last prompt tokens.

    The last `rows` queries have weights from 0 to 1, evenly spaced. A score is the largest weighted
    probability over queries and query heads. (Memory: queries times prompt in float32, so use it
    with small models.)
    """

    rows: int

    def window_rows(self, budget: int) -> int:
        return self.rows

    def score(self, view: LayerView) -> jax.Array:
        queries = view.queries
        if queries is None:
            raise ValueError("the attention of the last prompt tokens needs their queries")
        batch, rows, heads, dim = queries.q.shape
        kv_heads = view.k.shape[1]
        grouped = queries.q.reshape(batch, rows, kv_heads, heads // kv_heads, dim)
        raw = jnp.einsum("bmkgh,bkth->bkgmt", grouped, view.k, preferred_element_type=jnp.float32)
        raw = softcap_logits(raw * view.config.attn_scale, view.config.attn_softcap)
        seen = visible_by_position(queries.pos, view.pos, view.window)[:, :, None]
        raw = jnp.where(seen, raw, -jnp.inf)
        if view.sink_logits is not None:  # a column of their own, which gets no score
            sinks = view.sink_logits.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)
            raw = jnp.concatenate([raw, jnp.broadcast_to(sinks, (*raw.shape[:-1], 1))], axis=-1)
        probs = jax.nn.softmax(raw, axis=-1)[..., : view.k.shape[2]]
        probs = jnp.where(seen, probs, 0.0)  # a row that sees nothing is NaN
        weight = jnp.linspace(0.0, 1.0, rows, dtype=jnp.float32)[None, None, None, :, None]
        return (probs * weight).max((2, 3))


class Speculation(NamedTuple):
    """The small model's answers to a batch of prompts, and its attention on them."""

    answers: list[list[int]]  # greedy, an end token included
    attention: list[np.ndarray] | None  # [T] float32 of every prompt, if requested


def speculate(
    draft: Model,
    rows: Sequence[Sequence[int]],
    *,
    tokens: int,
    eos_ids: Sequence[int],
    attention: bool = False,
    window: int = 64,
    first_layer: int = 8,
) -> Speculation:
    """Greedy answers of at most `tokens` tokens, and SpecPC's attention on each prompt token.

    `rows` are token ids of a vocabulary that `draft` shares. The attention leaves out the layers
    before `first_layer`; if that is more than half of the layers, it leaves out the first half.
    """
    config = draft.config
    batch = jnp.asarray(pad_batch(rows, config=config))
    policy = TailAttention(rows=window) if attention else Full()
    read = read_prompt(
        draft.params, batch, config=config, policy=policy, budget=0, new_tokens=tokens,
        with_scores=attention,
    )  # fmt: skip
    done = decode(
        draft.params, read.cache, read.logits, config=config, max_new_tokens=tokens, eos_ids=eos_ids
    )
    count = np.asarray(done.count)
    answers = [row[:n].tolist() for row, n in zip(np.asarray(done.tokens), count, strict=True)]
    if not attention:
        return Speculation(answers, None)
    first = min(first_layer, config.num_layers // 2)
    scores = np.asarray(cast(jax.Array, read.scores)[first:].max((0, 2)))  # [B, T]
    return Speculation(answers, [s[: len(r)] for s, r in zip(scores, rows, strict=True)])


def draft_answers(
    draft_model: Model,
    rows: Sequence[Sequence[int]],
    *,
    policy: Policy,
    eos_ids: Sequence[int],
) -> list[list[int]]:
    """Answers drafted by a small model, for a policy that observes with them (speckv).

    Token ids, one answer per prompt in `rows`, as long as the policy reads; `eos_ids` end them.
    Raises ValueError for a policy that reads no drafts, and for a prompt outside the vocabulary of
    the draft model.
    """
    if not isinstance(policy.reading, WithDraft):
        raise ValueError(f"policy {type(policy).__name__} reads no drafts: leave them out")
    largest = max(map(max, rows))
    if largest >= draft_model.config.vocab_size:
        raise ValueError(
            f"a prompt has token id {largest} and the draft model only "
            f"{draft_model.config.vocab_size} tokens: both models must share a tokenizer"
        )
    return speculate(draft_model, rows, tokens=policy.reading.tokens, eos_ids=eos_ids).answers


def drafted_continuations(
    drafter: HostDrafter, rows: Sequence[Sequence[int]], *, tokens: int
) -> list[list[int]]:
    """The likeliest continuation of each prompt in `rows` by a drafter: at most `tokens` ids.

    Of the drafter's tree it is the path of the best nodes; empty where the drafter knows none.
    """
    continuations = []
    for row in rows:
        request = next(_READING)
        drafter.begin(request, row)
        try:
            draft = drafter.propose(request, _NODES * tokens, tokens)
        finally:
            drafter.end(request)
        continuations.append(_best_path(draft))
    return continuations


def _best_path(draft: Draft) -> list[int]:
    """From the root down, the best child of each node: the first, since the best come first."""
    path, at = [], -1
    for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        if parent == at:
            path.append(int(token))
            at = i
    return path


def select_tokens(
    attention: np.ndarray, keep: int, *, pool: int = 64, neighbours: int = 64, window: int = 64
) -> np.ndarray:
    """SpecPC: the prompt tokens that are kept, ascending indices, at most `keep`.

    Scores are smoothed by a centred maximum over `pool` tokens. The last `window` tokens are kept;
    then the best tokens in order of their scores, each with its nearest `neighbours` (itself
    included), closest first, until there are `keep`. Even sizes reach one token further ahead than
    back. Published values of `pool` and `neighbours`: 64 and 64 for a Qwen pair of models, 32 and
    32 for Llama.
    """
    length = len(attention)
    if keep >= length:
        return np.arange(length)
    back = (pool - 1) // 2
    padded = np.pad(attention, (back, pool - 1 - back))
    smooth = np.lib.stride_tricks.sliding_window_view(padded, pool).max(1)
    taken = np.zeros(length, bool)
    taken[length - min(window, keep) :] = True
    missing = keep - int(taken.sum())
    first = -((neighbours - 1) // 2)
    steps = np.array(sorted(range(first, first + neighbours), key=abs))  # 0, -1, 1, -2, 2, ...
    for best in np.argsort(-smooth, kind="stable")[:keep]:
        if missing <= 0:
            break
        near = best + steps
        near = near[(near >= 0) & (near < length)]
        near = near[~taken[near]][:missing]
        taken[near] = True
        missing -= len(near)
    return np.flatnonzero(taken)
