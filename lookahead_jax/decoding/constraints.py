"""The grammars of a batch: their masks are made on the host between steps."""

from collections.abc import Sequence

import jax
import numpy as np

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

    def masks(
        self, state: DecodeState, tokens: np.ndarray, parents: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masks of the next step's trees [B, P], as `allowed.allow_only` takes them, and their tokens.

        In the tokens, int32 [B, P], nodes that must not stay are -1; the root is not read. Raises
        RowError for a row that may not be continued, though its grammar is not complete.
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


def first_masks(grammars: Sequence[GrammarRow | None], vocab_size: int) -> np.ndarray | None:
    """The masks of each row's first token, uint32 [B, W]; None if no row follows a grammar."""
    if not any(grammars):
        return None
    masks = everything(len(grammars), vocab_size=vocab_size)
    for row, grammar in enumerate(grammars):
        if grammar is not None:
            masks[row] = grammar.mask()
    return masks
