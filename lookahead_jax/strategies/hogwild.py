"""Hogwild! Inference: workers write in parallel and see each other's tokens at once."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.decoding.sampling import (
    MAX_BIAS,
    Sampling,
    SamplingRows,
    TextSoFar,
    choose_tokens,
    process_logits,
)
from lookahead_jax.decoding.state import DecodeState, emit
from lookahead_jax.decoding.step import Steer
from lookahead_jax.decoding.tree import Accepted
from lookahead_jax.generation.output_text import OutputRow
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params
from lookahead_jax.prefilling.batching import bucket_length
from lookahead_jax.prefilling.prefill import extend
from lookahead_jax.strategies.base import Ranked, Strategy, check_at_least
from lookahead_jax.strategies.rows import Rows

SENTENCE_ENDS = tuple(".?!。۔؟।॥…‽།᠃։჻¶❧")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hogwild(Strategy):
    """`n` workers write one token each per step, and each reads what the others have written.

    A worker reads the prompt, the others' texts in their order, and its own text last: the
    contiguous layout of the paper (model/concurrent.py). Its text begins with `prefix`, in which
    {name} is its own of the `names` and {others} those of the others; that of the first also has
    `lead`. Where a worker ends a paragraph (`step`, after the end of a sentence) and all workers
    together have added more than `check_every` tokens since the last time, `check` is added to its
    text. What is added counts as written; an empty prefix or check is not added. After the prefix
    no worker chooses one of the tokens `forbidden`, such as the beginning of another's prefix. The
    first worker that ends is chosen, and the others stop there. (Rodionov et al. 2025,
    arXiv:2504.06261; prefix, forbidden tokens and greedy choice of their basic example, check of
    their full one. Left out: the rules of collaboration, which belong in the prompt, and the
    separator between the others' texts and the own. Unlike there, end tokens may be chosen.)
    """

    draws: ClassVar[bool | None] = None
    concurrent: ClassVar[bool] = True
    n: int = 2
    names: str = "Alice,Bob,Carol,Dave"
    prefix: str = "\n\n# {name} workspace\n\nI am {name}. Let's solve this together, {others}."
    lead: str = " Here's how we should collaborate:"
    check: str = "Quick check: am I doing redundant work? (yes/no): "
    check_every: int = 256
    step: str = "\n\n"
    forbidden: str = "#,</think>"

    def __post_init__(self) -> None:
        check_at_least("n", self.n, 1)
        check_at_least("check_every", self.check_every, 0)
        if not self.step:
            raise ValueError("step is empty: give the string that ends a paragraph")
        if self.prefix and len(self.names.split(",")) < self.n:
            raise ValueError(f"names={self.names} has too few for n={self.n}: give one per worker")

    @property
    def rows(self) -> int:
        """Rows that decode together for each prompt."""
        return self.n

    @property
    def prefixes(self) -> list[str]:
        """What each worker's text begins with."""
        if not self.prefix:
            return [""] * self.n
        names = [name.strip() for name in self.names.split(",")[: self.n]]
        texts = [
            self.prefix.replace("{name}", name).replace(
                "{others}", " and ".join(other for other in names if other != name)
            )
            for name in names
        ]
        return [texts[0] + self.lead, *texts[1:]]

    def steering(
        self, texts: jax.Array, room: int, sampling: Sampling, vocab_size: int
    ) -> tuple[Steer | None, Any]:
        """None; ValueError for a repetition penalty."""
        if sampling.repetition_penalty != 1.0:
            raise ValueError(
                "Hogwild takes back a first token, which repetition_penalty would still "
                "count: leave it 1"
            )
        return None, ()

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        check, room = self._introduce(rows), rows.state.tokens.shape[1]
        begin = np.zeros(rows.groups.size, np.int64)  # of each row's paragraph in its text
        since = np.zeros(len(rows.groups), np.int64)  # tokens since a check
        while True:
            ended = np.array([output.finish() != "length" for output in rows.outputs])
            ended = ended.reshape(rows.groups.shape)
            rows.end(np.repeat(ended.any(1), self.n))
            if not rows.running.any():
                return [Ranked(int(e.argmax()), [float(x) for x in e]) for e in ended]
            said = np.zeros_like(begin)
            for row in np.flatnonzero(rows.running).tolist():
                group, output = row // self.n, rows.outputs[row]
                if check and self._ends_paragraph(output, int(begin[row])):
                    begin[row] = len(output.text)
                    more = int(said[rows.groups[group]].sum()) + len(check)
                    fits = len(output.tokens) + len(check) < room and rows.affords(group, more)
                    if since[group] > self.check_every and fits:
                        said[row], since[group] = len(check), 0
                since[group] += 1 + said[row]
            if said.any():
                _say(rows, [check if n else [] for n in said.tolist()])
            else:
                rows.advance(1)

    def _introduce(self, rows: Rows) -> list[int]:
        """Begins all texts with their prefixes; the tokens of the check."""
        if not (self.prefix or self.check or self.forbidden):
            return []
        tokenizer: Any = rows.model.tokenizer
        if tokenizer is None:
            raise ValueError(
                "prefix, check and forbidden are texts, and this model has no tokenizer.json: give "
                "'' for each"
            )
        for name, text in [("prefix", p) for p in self.prefixes] + [("check", self.check)]:
            if ends := [stop for stop in rows.stop if stop in text]:
                raise ValueError(
                    f"the stop string {ends[0]!r} is in the {name} {text!r}: give another one, or "
                    f"another {name}"
                )
        known = [tokenizer.token_id(token) for token in self.forbidden.split(",") if token]
        if ids := [token for token in known if token is not None]:
            sampling = _forbidding(rows.state.sampling, ids)
            rows.replace(dataclasses.replace(rows.state, sampling=sampling))
        if self.prefix:
            prefixes = [tokenizer.encode_behind(text) for text in self.prefixes]
            total, longest = sum(map(len, prefixes)), max(map(len, prefixes))
            if longest >= rows.state.tokens.shape[1]:
                raise ValueError(
                    f"a worker's prefix has {longest} tokens: give max_new_tokens of more, or a "
                    "shorter prefix"
                )
            rows.replace(_without_text(rows.state))
            if not rows.affords(0, total):
                raise ValueError(
                    f"the workers' prefixes have {total} tokens: give most_tokens of at least "
                    f"{total + self.n}, or a shorter prefix"
                )
            _say(rows, prefixes * len(rows.groups))
        return tokenizer.encode_behind(self.check) if self.check else []

    def _ends_paragraph(self, output: OutputRow, begin: int) -> bool:
        """Whether the last token completes a paragraph that ends with a sentence."""
        at = output.text.rfind(self.step, begin)
        last = at >= 0 and at + len(self.step) > output.offsets[-1]
        return last and output.text[begin:at].strip().endswith(SENTENCE_ENDS)


def _say(rows: Rows, texts: list[list[int]]) -> None:
    """Adds a text to each row; then one step, which reads all that its cache lacks."""
    new = _padded(texts)
    said = _said(dataclasses.replace(rows.state, cache=None), new)
    rows.replace(dataclasses.replace(said, cache=rows.state.cache))
    if not rows.running.any():  # a stop string that began before ends here
        return
    tokens, count = np.asarray(rows.state.tokens), np.asarray(rows.state.count)
    known = np.asarray(rows.state.cache.next_pos) - rows.starts
    parts = zip(tokens, known, count, rows.running, strict=True)
    missing = _padded([text[begin:end].tolist() if run else [] for text, begin, end, run in parts])

    def move(_: Params, state: DecodeState) -> DecodeState:
        # Like a prompt, it is read from the stack of all layers.
        return _continue(rows.model.params, state, missing, config=rows.model.config)

    rows.step(move)


def _padded(texts: list[list[int]]) -> jax.Array:
    """int32 [B, W], padded with -1."""
    tokens = np.full((len(texts), bucket_length(max(map(len, texts)))), -1, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return jnp.asarray(tokens)


def _forbidding(sampling: SamplingRows, ids: list[int]) -> SamplingRows:
    """Settings that make the tokens `ids` all but impossible, by the source's bias."""
    rows = sampling.seed.shape[0]
    more = jnp.broadcast_to(jnp.asarray([ids], jnp.int32), (rows, len(ids)))
    return dataclasses.replace(
        sampling,
        # An id that stood twice would have either bias.
        bias_ids=jnp.concatenate(
            [jnp.where(jnp.isin(sampling.bias_ids, more), -1, sampling.bias_ids), more], axis=1
        ),
        bias=jnp.concatenate([sampling.bias, jnp.full(more.shape, -MAX_BIAS)], axis=1),
        biased=True,
    )


def _without_text(state: DecodeState) -> DecodeState:
    """Takes the first tokens back, which were chosen after the prompt."""
    return dataclasses.replace(
        state,
        tokens=jnp.full_like(state.tokens, -1),
        count=jnp.zeros_like(state.count),
        done=jnp.zeros_like(state.done),
    )


@program()
def _said(state: DecodeState, tokens: jax.Array) -> DecodeState:
    """Emits `tokens` [B, W], padded with -1; no step has read them. The state has no cache here."""
    count = (tokens >= 0).sum(1, dtype=jnp.int32)
    return emit(state, Accepted(jnp.zeros_like(tokens), count, tokens), None)


@program(static_argnames=("config",), donate_argnames=("state",))
def _continue(
    params: Params, state: DecodeState, tokens: jax.Array, *, config: ModelConfig
) -> DecodeState:
    """Reads the last emitted `tokens` [B, W], padded with -1, and chooses the next of each row."""
    cache, raw = extend(params, tokens, state.cache, config=config)
    finite = jnp.isfinite(raw).all(-1) | state.done
    processed = process_logits(raw[:, None], TextSoFar(state.seen, state.counts), state.sampling)
    token = choose_tokens(processed, cache.next_pos[:, None], state.sampling)
    state = dataclasses.replace(
        state, cache=cache, finite=state.finite & finite, done=state.done | ~finite
    )
    return emit(
        state, Accepted(jnp.zeros_like(token), (~state.done).astype(jnp.int32), token), None
    )
