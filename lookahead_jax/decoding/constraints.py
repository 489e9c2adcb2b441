"""The grammars of a batch: their masks are made on the host between steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lookahead_jax.decoding.device_drafter import DeviceDrafter, Proposed
from lookahead_jax.decoding.draft_programs import propose_trees
from lookahead_jax.decoding.grammar import GrammarRow, words
from lookahead_jax.decoding.row_error import RowError
from lookahead_jax.decoding.state import DecodeState


def everything(*shape: int, vocab_size: int) -> np.ndarray:
    """Masks that allow every token, uint32 [*shape, W]."""
    return np.full((*shape, words(vocab_size)), 0xFFFFFFFF, np.uint32)


class Constraints:
    """The grammars of a batch's rows, each at the end of its row's output."""

    def __init__(self, batch: int, vocab_size: int):
        self._vocab_size = vocab_size
        self._rows: list[GrammarRow | None] = [None] * batch
        self._observed = [0] * batch

    def put(self, row: int, grammar: GrammarRow | None) -> None:
        """From now on a row, which has no output yet, follows a grammar; None: it does not."""
        self._rows[row], self._observed[row] = grammar, 0

    def follow(self, state: DecodeState) -> bool:
        """Takes what the rows have emitted; whether one that still runs follows a grammar.

        Raises RowError for a row whose grammar fails.
        """
        if not any(self._rows):
            return False
        tokens, counts, done = jax.device_get((state.tokens, state.count, state.done))
        running = False
        for row, grammar in enumerate(self._rows):
            if grammar is None or done[row]:  # the last token of a row that is done may be its end
                continue
            running = True
            new = tokens[row, self._observed[row] : counts[row]]
            self._observed[row] = int(counts[row])
            try:
                grammar.observe(new.tolist())
            except ValueError as error:
                raise RowError(row, error) from error
        return running

    def prepare(
        self,
        state: DecodeState,
        drafter: DeviceDrafter | None,
        weights: Any,
        nodes: int,
        *,
        call: Callable[..., Any],
    ) -> tuple[DecodeState, dict[str, Any]]:
        """The state with the trees of the next step, and options of `decode_step`: their masks.

        `drafter` proposes the trees from `weights`; None: a host drafter has put them into the
        state, or they have one node. `call` runs a program. Raises RowError for a row that may not
        be continued, though its grammar is not complete.
        """
        if nodes == 1:
            none = np.full((len(self._rows), 1), -1, np.int32)
            return state, {"allowed": self._masks(state, none, none)[0]}
        if drafter is None:
            allowed, tokens = self._masks(state, *state.draft)
            draft = np.stack([tokens, state.draft[1]])
            return dataclasses.replace(state, draft=draft), {"allowed": allowed}
        own, tree = call(
            propose_trees, weights, state.draft, state.token, drafter=drafter, nodes=nodes
        )
        parents = np.asarray(tree.parents)
        allowed, tokens = self._masks(state, np.asarray(tree.tokens), parents)
        state = dataclasses.replace(state, draft=(own, tree.replace(tokens=tokens)))
        return state, {"allowed": allowed, "drafter": Proposed(drafter)}

    def _masks(
        self, state: DecodeState, tokens: np.ndarray, parents: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The masks of trees [B, P], uint32 [B, P, W], and their tokens, int32 [B, P].

        Nodes that must not stay have the token -1; the root is not read.
        """
        allowed = everything(*tokens.shape, vocab_size=self._vocab_size)
        tokens, done = tokens.copy(), np.asarray(state.done)
        for row, grammar in enumerate(self._rows):
            if grammar is None or done[row]:
                continue
            try:
                allowed[row], stays = grammar.masks(tokens[row], parents[row])
            except ValueError as error:
                raise RowError(row, error) from error
            tokens[row] = np.where(stays, tokens[row], -1)
        return allowed, tokens
