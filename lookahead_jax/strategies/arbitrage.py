"""Arbitrage: a draft model writes the steps; those that the model would improve are its own."""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np

from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.decoding.step import Steer
from lookahead_jax.strategies.base import Ranked, Strategy, check_at_least
from lookahead_jax.strategies.rows import Rows
from lookahead_jax.strategies.texts import Texts, put_texts, read_texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arbitrage(Strategy):
    """Each step is the draft model's, or the model's where its advantage exceeds `threshold`.

    A step ends with the string `step`, after `step_tokens` tokens, or with the text. With a reward
    both models write each step, and the advantage is the difference of their rewards (the oracle of
    the paper). A router predicts it from the draft's step, and the model reads and writes only
    where it is asked. Lossy by design: the text is neither model's own. Where the limits on work
    leave no step of the model, the draft's stays. (Maheswaran et al. 2025, arXiv:2512.05033; `step`
    and `step_tokens` of their code, whose runs have thresholds from 0 to 1.)
    """

    draws: ClassVar[bool | None] = None
    reads_reward: ClassVar[bool] = True
    routes: ClassVar[bool] = True
    threshold: float = 0.0
    step: str = "\n\n"
    step_tokens: int = 2048

    def __post_init__(self) -> None:
        check_at_least("step_tokens", self.step_tokens, 1)
        if not np.isfinite(self.threshold):
            raise ValueError(f"threshold={self.threshold} must be a finite number")
        if not self.step:
            raise ValueError("step is empty: give the string that ends a step")

    def steering(
        self, texts: jax.Array, room: int, sampling: Sampling, vocab_size: int
    ) -> tuple[Steer | None, Any]:
        """None; ValueError for a repetition penalty."""
        if sampling.repetition_penalty != 1.0:
            raise ValueError(
                "Arbitrage takes back steps, which repetition_penalty would still count: leave it 1"
            )
        return None, ()

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        draft = rows.beside
        if draft is None:
            raise ValueError("Arbitrage needs a draft model: give draft_model=")
        texts: list[list[int]] = [[] for _ in rows.texts]
        going = np.ones(len(texts), bool)
        while going.any():
            begin = self._write(draft, texts, going)
            going &= _longer(draft, texts)  # not where the work is spent
            asked = going.copy()
            if draft.router is not None:
                for row in np.flatnonzero(going).tolist():
                    asked[row] = draft.predict(row, begin[row]) > self.threshold
            better = np.zeros_like(asked)
            if asked.any():
                self._write(rows, texts, asked)
                better = asked & _longer(rows, texts)
            ended = rows.finished.copy()
            if draft.router is None:
                better[better] = _advantages(rows, draft, better) > self.threshold
            for row in np.flatnonzero(going).tolist():
                side = rows if better[row] else draft
                texts[row] = list(side.outputs[row].tokens)
                going[row] = not (ended if better[row] else draft.finished)[row]
        put_texts(rows, texts)
        return [Ranked(0, [None]) for _ in texts]

    def _write(self, side: Rows, texts: Texts, asked: np.ndarray) -> list[int]:
        """Adds a step of `side` to the texts of the rows `asked`; where it begins in each text."""
        begin = [0] * len(texts)
        if texts[0]:  # then all prompts have a step; before, each model has its own first token
            put_texts(side, texts)
            read_texts(side, texts, asked)
            begin = [len(output.text) for output in side.outputs]
        side.hold(~asked)

        def ends(row: int) -> bool:
            output = side.outputs[row]
            there = self.step in output.text[begin[row] :]
            return there or len(output.tokens) - len(texts[row]) >= self.step_tokens

        side.pause(ends)
        side.advance(until=ends)
        return begin


def _longer(side: Rows, texts: Texts) -> np.ndarray:
    """[R] rows in which `side` has written something after `texts`."""
    return np.array([len(o.tokens) > len(t) for o, t in zip(side.outputs, texts, strict=True)])


def _advantages(rows: Rows, draft: Rows, asked: np.ndarray) -> np.ndarray:
    """By how much the rewards of the model's steps exceed those of the draft's, in rows `asked`."""
    judged = np.flatnonzero(asked).tolist()
    ours = rows.score(judged)
    if not rows.judges_states:
        theirs = draft.score(judged)
    else:  # the model has to read the draft's text
        before = rows.state
        sides = [draft if row in judged else rows for row in range(len(asked))]
        put_texts(rows, [list(side.outputs[row].tokens) for row, side in enumerate(sides)])
        theirs = rows.score(judged)
        rows.restore(before)
    return np.subtract(ours, theirs)
