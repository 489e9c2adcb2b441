"""The rows of a search on the host: they advance, pause, end, are scored and resampled.

Each prompt has the same number of rows, side by side. Whatever happens to them depends on their own
prompt alone, so a prompt's answer does not depend on the batch. R rows, G prompts.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.state import DecodeState
from lookahead_jax.decoding.step import Steer, decode_burst
from lookahead_jax.decoding.weights import for_decoding
from lookahead_jax.generation.generate import check_finite
from lookahead_jax.generation.output_text import OutputRow
from lookahead_jax.model.params import Params
from lookahead_jax.modules.reward_head import RewardHead
from lookahead_jax.strategies.hidden_reward import text_chances
from lookahead_jax.strategies.primitives import gather_rows, replace_last, with_prompt

Reward = Callable[[str, str], float] | RewardHead
"""(prompt, its continuation so far) -> how good it is; larger is better. Or a head on the model's
hidden states."""
Router = Callable[[str, str], float]
"""(text so far, a step that a draft model has added) -> by how much the model's would be better."""
Verifier = Callable[[str, str, str | None], float]
"""(prompt, a thought's answer, an earlier one) -> the probability that both agree; without an
earlier one, that the thought answers the prompt."""
BURST = 16  # steps between two looks of the host


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one prompt has cost, or may cost (None: any amount)."""

    tokens: int | None = None
    """Emitted in all its rows, those of rows that were given up included."""
    forwards: int | None = None
    """Steps of the model with at least one of its rows; the prompt's own is not counted."""


ANY_WORK = Work()


class Rows:
    """`copies` rows for each of the prompts `texts`.

    Args:
      state: decoding state of all rows, with their first tokens.
      logits: [R, V] float32, which chose these.
      steer: the logit processor whose state is `state.steering`.
      seeds: one per prompt, for the choices that a strategy makes on the host.
      ends: tokens that end a row.
      stop: strings that end a row.
      limits: on the work for one prompt; its rows end where the next step would exceed them.
      reward: what `score` asks, with the texts of the prompts.
      reserve: forwards of the limits that are left for a last score.
      router: what `predict` asks.
      verifier: what `verify` asks.
      beside: rows in which a draft model continues the same prompts, on the same account of work.
    """

    def __init__(
        self,
        model: Model,
        texts: Sequence[list[int]],
        state: DecodeState,
        logits: jax.Array,
        *,
        copies: int,
        seeds: Sequence[int],
        ends: Sequence[int],
        stop: Sequence[str] = (),
        limits: Work = ANY_WORK,
        steer: Steer | None = None,
        reward: Reward | None = None,
        reserve: int = 0,
        router: Router | None = None,
        verifier: Verifier | None = None,
        beside: "Rows | None" = None,
    ):
        self.model = model
        self.params: Params = for_decoding(model.params)
        self.state = state
        self.starts = np.array(state.cache.next_pos)
        """[R] the position at which a row's own text begins, behind its prompt."""
        self.logits = logits
        self.texts = texts
        self.copies = copies
        self.seeds = seeds
        self._ends = ends
        self.stop = stop
        self._limits = limits
        self._steer = steer
        self.reward = reward
        self._reserve = reserve
        self.router = router
        self._verifier = verifier
        self.beside = beside
        account = np.zeros((len(texts), 2), np.int64)  # tokens, forwards
        self._spent = account if beside is None else beside._spent
        self.finished = np.zeros(len(texts) * copies, bool)
        """[R] rows that have come to an end of their own, or to that of their prompt's work."""
        self._paused = np.zeros_like(self.finished)
        self._outputs: list[OutputRow] | None = None
        self._read: jax.Array | None = None  # the tokens that `_outputs` has
        self._spend(np.asarray(state.count), np.zeros(len(texts), np.int64))
        self._look(None)

    @property
    def groups(self) -> np.ndarray:
        """[G, copies] the rows of each prompt."""
        return np.arange(len(self.finished)).reshape(len(self.texts), self.copies)

    @property
    def running(self) -> np.ndarray:
        """[R] rows that the next step moves."""
        return ~np.asarray(self.state.done)

    @property
    def spent(self) -> list[Work]:
        """The work for each prompt so far."""
        return [Work(tokens=int(t), forwards=int(f)) for t, f in self._spent]

    @property
    def tokens_left(self) -> np.ndarray:
        """[G] tokens that the limits still allow."""
        return self._left()[:, 0]

    @property
    def outputs(self) -> list[OutputRow]:
        """Tokens and text of every row so far."""
        if self._outputs is None:
            self._outputs = [
                OutputRow(
                    self.model.tokenizer, prompt=self.texts[row // self.copies],
                    stop=self.stop, end_ids=self._ends,
                )
                for row in range(len(self.finished))
            ]  # fmt: skip
            self._read = None
        if self._read is not self.state.tokens:
            tokens, count = np.asarray(self.state.tokens), np.asarray(self.state.count)
            for row, output in enumerate(self._outputs):
                output.feed(tokens[row, len(output.tokens) : count[row]].tolist())
            self._read = self.state.tokens
        return self._outputs

    def advance(
        self,
        steps: int | None = None,
        *,
        until: Callable[[int], bool] | None = None,
        first: bool = False,
    ) -> None:
        """Moves every running row by `steps` tokens, or to its end.

        A row pauses where `until(row)` holds after a token. It is asked for every token, and the
        row has its text in `outputs`. With `first`, all rows of a prompt end together with the
        first that comes to an end of its own.
        """
        left = self.state.tokens.shape[1] if steps is None else steps
        if first:
            self._end_with_first()
        while left > 0 and (running := self.running).any():
            most = 1 if self.stop or until is not None or first else BURST
            burst = min(left, most, self._affordable(running))
            before = np.array(self.state.count)
            self.state = decode_burst(
                self.params, self.state, config=self.model.config, steps=burst, steer=self._steer
            )
            new = np.asarray(self.state.count) - before
            self._spend(new, new.reshape(self.groups.shape).max(1))
            self._look(until)
            if first:
                self._end_with_first()
            left -= burst

    def step(self, move: Callable[[Params, DecodeState], DecodeState]) -> None:
        """One step of the strategy's own, which may change any token that was emitted."""
        running = self.running
        self.state = move(self.params, self.state)
        self._outputs, self.finished[:] = None, False  # rows may have changed places
        self._spend(running, np.any(running.reshape(self.groups.shape), axis=1))
        self._look(None)

    def replace(self, state: DecodeState) -> None:
        """Puts a state with other last tokens in the place of the present one.

        It may come without the prompts (`without_prompt`): these stay what they are.
        """
        if state.cache.shared is None:
            state = with_prompt(state, self.state.cache.shared)
        more = np.asarray(state.count) - np.asarray(self.state.count)
        self.state, self._outputs, self.finished[:] = state, None, False
        self._spend(more, np.zeros(len(self.texts), np.int64))
        self._look(None)

    def pause(self, until: Callable[[int], bool]) -> None:
        """Pauses the running rows where `until(row)` holds."""
        self._look(until)

    def resume(self) -> None:
        """All paused rows go on."""
        self._paused[:] = False
        self._set_done(self.finished)

    def hold(self, rows: np.ndarray) -> None:
        """Pauses the rows [R] bool."""
        self._paused |= rows & self.running
        self._set_done(np.asarray(self.state.done) | rows)

    def refund(self, rows: np.ndarray) -> None:
        """Does not count the last token of the rows [R] bool, which nothing will follow."""
        self._spend(-rows.astype(np.int64), np.zeros(len(self.texts), np.int64))

    def affords(self, group: int, tokens: int, *, forwards: int = 1) -> bool:
        """Whether a prompt may add `tokens` to its texts before a step of all its rows.

        `forwards` are the steps that both need.
        """
        left = self._left()[group]
        return bool(tokens + self._active()[group] <= left[0] and left[1] >= forwards)

    def restore(self, state: DecodeState) -> None:
        """Goes back to a copy of an earlier state, without paused rows; what was spent stays so."""
        # The copy's prompt has been donated since; it is that of the present state.
        self.state, self._outputs = with_prompt(state, self.state.cache.shared), None
        self.finished[:], self._paused[:] = False, False
        self._look(None)

    def steer_from(self, steering: Any) -> None:
        """Puts another state of the logit processor in the place of the present one."""
        self.state = dataclasses.replace(self.state, steering=steering)

    def end(self, rows: np.ndarray) -> None:
        """Ends the rows [R] bool where they are."""
        self.finished |= rows
        self._set_done(np.asarray(self.state.done) | rows)

    def gather(self, index: np.ndarray) -> None:
        """Row i becomes a copy of row `index[i]`, of the same prompt; it draws its own noise."""
        self.state = gather_rows(self.state, jnp.asarray(index, jnp.int32), self.state.sampling)
        self.finished, self._paused = self.finished[index], self._paused[index]
        self._outputs = None

    def fork(self, parents: np.ndarray, tokens: np.ndarray, new: np.ndarray) -> None:
        """The rows `new` [R] bool copy their `parents`, but end with `tokens` [R], which count."""
        self.gather(np.where(new, parents, np.arange(len(new))))
        self._spend(new, np.zeros(len(self.texts), np.int64))
        self.replace(replace_last(self.state, jnp.asarray(tokens, jnp.int32), jnp.asarray(new)))

    def close(self) -> None:
        """Nothing follows."""

    def score(self, rows: Sequence[int]) -> list[float]:
        """The reward of each of `rows`; raises ValueError for one that is no finite number.

        A head scores all of them in one forward, which counts as one for each of their prompts.
        """
        if isinstance(self.reward, RewardHead):
            scores = text_chances(
                self.reward, self.state, rows, self.starts, model=self.model, params=self.params,
                ends=self._ends,
            )  # fmt: skip
            self._spend(np.zeros(len(self.finished), np.int64), np.isin(self.groups, rows).any(1))
            self._look(None)
            return [_finite("reward", score) for score in scores]
        tokenizer: Any = self.model.tokenizer
        if self.reward is None or tokenizer is None:
            raise ValueError("rewards need a function reward= and a model with a tokenizer")
        outputs, scores = self.outputs, []
        for row in rows:
            prompt = tokenizer.decode(self.texts[row // self.copies])
            scores.append(_finite("reward", float(self.reward(prompt, outputs[row].text))))
        return scores

    @property
    def judges_states(self) -> bool:
        """Whether rewards are those of a head, which knows the states of this model only."""
        return isinstance(self.reward, RewardHead)

    def predict(self, row: int, begin: int) -> float:
        """What the router says about the text of a row from character `begin` on, its last step."""
        tokenizer: Any = self.model.tokenizer
        if self.router is None or tokenizer is None:
            raise ValueError("predictions need a function router= and a model with a tokenizer")
        text = self.outputs[row].text
        before = tokenizer.decode(self.texts[row // self.copies]) + text[:begin]
        return _finite("router", float(self.router(before, text[begin:])))

    def verify(self, row: int, answer: str, earlier: str | None = None) -> bool:
        """Whether an answer in a row's thinking is one, and the same as an `earlier` one."""
        tokenizer: Any = self.model.tokenizer
        if self._verifier is None or tokenizer is None:
            raise ValueError("thoughts need a function verifier= and a model with a tokenizer")
        prompt = tokenizer.decode(self.texts[row // self.copies])
        chance = _finite("verifier", float(self._verifier(prompt, answer, earlier)))
        if not 0 <= chance <= 1:
            raise ValueError(f"the verifier returned {chance}: it must return a probability")
        return chance > 0.5

    def rng(self, group: int, turn: int) -> np.random.Generator:
        """The random numbers of a prompt's `turn`-th choice on the host."""
        return np.random.default_rng([self.seeds[group] % 2**32, turn])

    def _end_with_first(self) -> None:
        """Ends all rows of the prompts of which a row has ended with its text."""
        ended = np.array([output.finish() != "length" for output in self.outputs])
        self.end(np.repeat(ended.reshape(self.groups.shape).any(1), self.copies))

    def _set_done(self, done: np.ndarray) -> None:
        # Placed as it was: an array without a place would compile the step once more. A copy: on
        # CPU the device's array may be the host's memory, and `finished` changes there.
        done = jax.device_put(done.copy(), self.state.done.sharding)
        self.state = dataclasses.replace(self.state, done=done)

    def _look(self, until: Callable[[int], bool] | None) -> None:
        """Reads what the last step has emitted: which rows have ended, and which pause."""
        done = np.array(self.state.done)
        own = [self.texts[row // self.copies] for row in range(len(done))]
        if not np.asarray(self.state.finite).all():
            check_finite(self.model, self.state, own, self.outputs)
        self.finished |= done & ~self._paused
        if self.stop or until is not None:
            running = ~done
            outputs = self.outputs
            self.finished |= np.array([output.stopped for output in outputs])
            if until is not None:
                waits = np.array([bool(run and until(row)) for row, run in enumerate(running)])
                self._paused |= waits & ~self.finished
        self.finished |= self._exhausted()
        if (rest := self.finished | self._paused)[~done].any():
            self._set_done(done | rest)

    def _spend(self, tokens: np.ndarray, forwards: Any) -> None:
        self._spent[:, 0] += tokens.reshape(self.groups.shape).sum(1)
        self._spent[:, 1] += forwards

    def _left(self) -> np.ndarray:
        """[G, 2] tokens and forwards that the limits leave."""
        most = [
            np.iinfo(np.int32).max if n is None else n for n in dataclasses.astuple(self._limits)
        ]
        return np.array(most) - [0, self._reserve] - self._spent

    def _active(self) -> np.ndarray:
        """[G] rows that may still need work: paused ones may."""
        return (~self.finished).reshape(self.groups.shape).sum(1)

    def _exhausted(self) -> np.ndarray:
        """[R] rows of prompts that cannot afford a step of all their rows."""
        left, active = self._left(), self._active()
        return np.repeat((left[:, 0] < active) | (left[:, 1] < 1), self.copies)

    def _affordable(self, running: np.ndarray) -> int:
        """Steps that every prompt with running rows can afford."""
        left, active = self._left(), self._active()
        some = running.reshape(self.groups.shape).any(1)
        return int(np.minimum(left[:, 0] // np.maximum(active, 1), left[:, 1])[some].min())


def _finite(name: str, value: float) -> float:
    if not np.isfinite(value):
        raise ValueError(f"the {name} returned {value}: it must return a finite number")
    return value
