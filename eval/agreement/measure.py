"""One prompt on the full cache and on cut ones: how far the model's answer changes.

A cut cache is the full one with the dropped entries masked (compare/masked.py), so a prompt is read
once whatever the number of policies and budgets.

Letters: L layers, B batch, K KV heads, S slots, U budgets, Y answer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.step import decode
from lookahead_jax.eval.compare.masked import Reference, keep_masks, masked, outcome, read_full
from lookahead_jax.eval.scorers.text import token_f1
from lookahead_jax.model.cache import KVCache
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.policies.base import Policy
from lookahead_jax.prefilling.batching import pad_batch


class Agreement(NamedTuple):
    """How one cut cache agrees with the full one on one prompt."""

    kl: float
    """Mean over the answer's tokens of KL(full || cut) of the next token, in nats."""
    same: float
    """Share of the answer's tokens that are the most likely ones on the cut cache, too."""
    followed: float
    """Share of the answer before the first token that is not."""
    f1: float | None
    """F1 of the words of the answer that is written on the cut cache; None if not measured."""


def read_reference(model: Model, ids: Sequence[int], response_tokens: int) -> Reference:
    """A prompt under the full cache, with the model's own greedy answer to it."""
    tokens = jnp.asarray(pad_batch([ids], config=model.config))
    return read_full(
        model.params, tokens, None, config=model.config, eos_ids=model.generation.eos_ids,
        response_tokens=response_tokens,
    )  # fmt: skip


def agreements(
    model: Model,
    reference: Reference,
    policy: Policy,
    budgets: tuple[int, ...],
    *,
    modules: LookaheadModules | None,
) -> list[Agreement]:
    """The agreement at each budget, of a reference with one prompt.

    Raises ValueError for a model with sliding windows, and for policies that `keep_masks` refuses.
    """
    config, eos_ids = model.config, model.generation.eos_ids
    keep = keep_masks(
        model.params, reference, policy, budgets, modules=modules, config=config, eos_ids=eos_ids
    )
    result = outcome(model.params, reference, keep, config=config)
    there = np.asarray(reference.forced[0]) >= 0
    full = np.asarray(reference.scores[0].argmax(-1))[there]
    same = np.asarray(result.choice)[:, 0, there] == full
    kl = np.asarray(result.kl)[:, 0, there]
    answers = decode(
        model.params, _cut(reference.cache, keep), jnp.repeat(reference.logits, len(budgets), 0),
        config=config, max_new_tokens=there.size, eos_ids=eos_ids,
    ).tokens  # fmt: skip
    own = _tokens(reference.response[0])
    return [
        agreement(kl[u], same[u], f1_of(model, _tokens(answers[u]), own))
        for u in range(len(budgets))
    ]


def agreement(kl: np.ndarray, same: np.ndarray, f1: float | None) -> Agreement:
    """From KL [Y] at each token of the answer, and whether the most likely one is the same [Y]."""
    return Agreement(
        kl=float(kl.mean()),
        same=float(same.mean()),
        followed=float(np.cumprod(same).mean()),
        f1=f1,
    )


def f1_of(model: Model, written: Sequence[int], own: Sequence[int]) -> float:
    """F1 of the words of one answer against those of another; 1 for two answers without words.

    Raises ValueError for a model without a tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError("answers are compared as texts, and the model has no tokenizer")
    words, expected = (model.tokenizer.decode(row).split() for row in (written, own))
    return float(words == expected) or token_f1(words, expected)


def _cut(cache: KVCache, keep: jax.Array) -> KVCache:
    """A cache of one row and `keep` [U, L, 1, K, S] -> U rows, each cut differently."""
    return masked(cache.fork(keep.shape[0]), keep[:, :, 0].swapaxes(0, 1))


def _tokens(row: jax.Array) -> list[int]:
    return [token for token in np.asarray(row).tolist() if token >= 0]
