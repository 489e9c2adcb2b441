"""ThinkRouter: while a model thinks, samples where it is unsure, else soft tokens; lossy."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.decoding.step import NEVER, SoftTokens, Steer
from lookahead_jax.strategies.base import Ranked, Strategy, check_at_least
from lookahead_jax.strategies.likelihood import log_distribution
from lookahead_jax.strategies.rows import Rows

_TAIL = 4  # last tokens of a prompt; where the end of thinking is one of them, it is over


class Thoughts(NamedTuple):
    """How far each row has come with its thinking, and what it reads next."""

    thinking: jax.Array  # [B] bool
    sure: jax.Array  # [B] int32 steps in succession with an entropy below `cold_entropy`
    soft: SoftTokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinkRouter(Strategy):
    """Thinks in tokens where it is unsure, and in means of embeddings where it is sure; lossy.

    Until the token `end`, a step whose largest probability is below `threshold` draws a token. In
    any other step the model reads a soft token next: the embeddings of the `k` likeliest tokens,
    weighted by their probabilities, without those below `min_p` times the largest. The likeliest
    is recorded as the text. After `cold_steps` steps in succession with an entropy below
    `cold_entropy` nats the thinking is ended by the token `end`. What follows is sampled as usual.

    Largest probability and entropy are those at the temperature, before other filters; the weights
    are those after them. Without `end`, "", the whole text is thinking and is not ended.
    (Xu et al. 2026, arXiv:2602.11683, with soft tokens, cold stop and defaults of Soft Thinking,
    Zhang et al. 2025, arXiv:2505.15778, and its code. ThinkRouter tunes the threshold for each
    model and task; 0.8 is a value to begin with.)
    """

    default_sampling: ClassVar[Sampling] = Sampling(temperature=0.6, top_k=30, top_p=0.95)
    draws: ClassVar[bool] = True
    threshold: float = 0.8
    k: int = 10
    min_p: float = 0.001
    cold_entropy: float = 0.01
    cold_steps: int = 256
    end: str = "</think>"

    def __post_init__(self) -> None:
        check_at_least("threshold", self.threshold, 0)
        check_at_least("k", self.k, 1)
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} is not possible: give 0 to 1")
        check_at_least("cold_entropy", self.cold_entropy, 0)
        check_at_least("cold_steps", self.cold_steps, 1)

    def for_model(self, model: Model) -> "Strategy":
        """The strategy with the id of the token `end`; ValueError if it is not one token."""
        if self.k > model.config.vocab_size:
            raise ValueError(f"k={self.k} is more than the vocabulary: lower it")
        return _OfModel(**dataclasses.asdict(self), end_id=self._end_id(model.tokenizer))

    def _end_id(self, tokenizer: Any) -> int | None:
        if not self.end:
            return None
        if tokenizer is None:
            raise ValueError(
                f"thinking ends with {self.end!r}, and this model has no tokenizer.json: put it "
                "there, or give end='' for thinking without end"
            )
        ids = tokenizer.encode(self.end, special=False)
        if len(ids) != 1:
            raise ValueError(
                f"end={self.end!r} is {len(ids)} tokens of this model: give a text that is one "
                "token, or end='' for thinking without end"
            )
        return ids[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfModel(ThinkRouter):
    """ThinkRouter for a model whose thinking ends with the token `end_id`."""

    end_id: int | None

    def steering(
        self, texts: jax.Array, room: int, sampling: Sampling, vocab_size: int
    ) -> tuple[Steer | None, Any]:
        """The router, and rows that begin to think."""
        if sampling.repetition_penalty != 1.0:
            raise ValueError("ThinkRouter weighs tokens: leave the repetition penalty out")
        rows = texts.shape[0]
        no, zero = jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32)
        ids, weights = jnp.zeros((rows, self.k), jnp.int32), jnp.zeros((rows, self.k), jnp.float32)
        thinking = ~no
        if self.end_id is not None:  # a template may have ended the thinking, and a line after it
            last = (texts >= 0).sum(1)[:, None] - 1 - jnp.arange(_TAIL)[None]
            tail = jnp.take_along_axis(texts, jnp.maximum(last, 0), axis=1)
            thinking = ~((tail == self.end_id) & (last >= 0)).any(1)
        return Route(self, sampling), Thoughts(thinking, zero, SoftTokens(no, ids, weights))

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        rows.advance()
        return [Ranked(0, [None]) for _ in rows.groups]


@dataclasses.dataclass(frozen=True)
class Route:
    """Forces the likeliest token where a soft token is read, and `end` where thinking is ended."""

    settings: _OfModel
    sampling: Sampling

    def __call__(
        self, state: Thoughts, logits: jax.Array, last: jax.Array
    ) -> tuple[Thoughts, jax.Array]:
        settings = self.settings
        plain = dataclasses.replace(self.sampling, top_k=None, top_p=None, min_p=None)
        log_p = log_distribution(logits, plain)
        p = jnp.exp(log_p)
        entropy = -jnp.where(p > 0, p * log_p, 0.0).sum(-1)
        sure = jnp.where(entropy < settings.cold_entropy, state.sure + 1, 0)
        kept = jnp.exp(log_distribution(logits, self.sampling))
        weights, ids = jax.lax.top_k(kept, settings.k)
        weights = jnp.where(weights >= settings.min_p * weights[:, :1], weights, 0.0)
        weights /= weights.sum(-1, keepdims=True)
        forced, thinking = ids[:, 0], state.thinking
        soft = p.max(-1) >= settings.threshold
        fixed, end = soft, settings.end_id
        if end is not None:
            thinking &= last != end
            cold = sure >= settings.cold_steps
            forced, fixed = jnp.where(cold, end, forced), fixed | cold
            soft &= forced != end  # the answer begins after the token itself
        only = jnp.where(jnp.arange(logits.shape[1])[None] == forced[:, None], 0.0, NEVER)
        steered = jnp.where((fixed & thinking)[:, None], only, logits)
        soft_tokens = SoftTokens(soft & thinking, ids, weights)
        return Thoughts(thinking, sure, soft_tokens), steered

    def soft_tokens(self, state: Thoughts) -> SoftTokens:
        """What the rows read next."""
        return state.soft
