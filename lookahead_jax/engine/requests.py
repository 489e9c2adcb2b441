"""Requests to an engine, their limits, and the events and results that answer them."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.decoding.grammar import CompiledGrammar, Grammar
from lookahead_jax.decoding.logprobs import Logprobs, check_alternatives
from lookahead_jax.decoding.sampling import GREEDY, Sampling
from lookahead_jax.generation.output_text import FinishReason, OutputRow
from lookahead_jax.host.integers import check_integer
from lookahead_jax.host.panics import panics_as_errors
from lookahead_jax.prefilling.batching import pin_mask

MAX_EOS_IDS = 16  # room in every row's state; checkpoints name up to five
SMALL_TEXT = 2**16
"""Bytes of text that are tokenized whatever the limits: that takes milliseconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how to continue it; the fields mean what they mean to `generate`."""

    prompt: str | Sequence[int]
    max_new_tokens: int
    document: str | Sequence[int] | None = None
    """Read and cut on its own, as if nothing followed. The prompt is read after the entries that
    were kept and stays whole. Requests with the same document share its reading."""
    pin: Sequence[tuple[int, int]] = ()
    """Spans (start, end) of the document's tokens, or without one of the prompt's, that are kept
    whatever their score, in every layer and head and while decoding. They count in the budget."""
    tenant: str = ""
    """Whose request it is. Stored prompts of one tenant never serve another, and a free row goes to
    the waiting tenant that holds the fewest."""
    plain: bool = False
    """Encode control tokens that the texts spell ("<|im_end|>") as ordinary characters."""
    policy: str | None = None
    """The policy that cuts the prompt, one of the engine's `policies`; None: the engine's own."""
    draft: bool = True
    """Whether the engine's drafter may draft for it. The tokens are the same without, except with
    drawn_model, which emits other tokens of the same distribution."""
    sampling: Sampling = GREEDY
    seed: int = 0
    stop: Sequence[str] = ()
    eos_ids: Sequence[int | str] | None = None
    """Tokens that end the row, by id or content; None: the engine's."""
    stop_token_ids: Sequence[int | str] = ()
    """More such tokens, besides `eos_ids`."""
    logprobs: int | None = None
    """Return the log-probability of every token, and of so many of the likeliest tokens in its
    place (0 to 20); None: neither."""
    grammar: Grammar | None = None
    """What the output must be, up to its end token."""
    on_event: Callable[["Event"], None] | None = None
    """Receives the request's events in the stepping thread; an error in it ends the request."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestTiming:
    """Seconds since the request was submitted; None if it ended before that."""

    started_s: float | None  # until the reading of its prompt began
    first_token_s: float | None  # until its first token was handed out
    ended_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A request that has ended, with everything it emitted."""

    id: int
    tokens: list[int]  # an end-of-sequence token included
    text: str | None  # None without a tokenizer; cut before a stop string
    offsets: list[int]  # characters of the output before each token, those of a stop string too
    logprobs: Logprobs | None  # of all tokens; None unless asked for
    finish: FinishReason | Literal["cancelled", "error"]
    error: str | None  # why, if finish is "error"
    prompt_tokens: int
    reused_tokens: int  # prompt tokens that an earlier request had read
    kept_entries: float | None  # of the prompt, mean over layers and KV heads; None: not read
    steps: int  # model steps after the prompt; each emits one token or more
    timing: RequestTiming


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """News of one request: new tokens, new text, or its end."""

    id: int
    tokens: list[int]
    text: str  # the new text that is certain; it may lag behind the tokens
    offsets: list[int]  # characters of the output before each of the tokens
    logprobs: Logprobs | None  # of the tokens; None unless asked for
    result: Result | None  # the last event of every request has one


class RequestError(ValueError):
    """A request that cannot be served because of its `field`."""

    def __init__(self, message: str, field: str):
        super().__init__(message)
        self.field = field


class TooLong(RequestError):
    """The field has more tokens, or bytes of text, than the engine has room for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The sizes of an engine's rows."""

    max_prompt_tokens: int
    max_new_tokens: int
    max_question_tokens: int
    token_bytes: int = 1
    """Most bytes of text that one token stands for."""
    max_pinned_tokens: int | None = None
    """The budget of an engine that evicts; None: no limit."""

    def __post_init__(self):
        least = dict(max_prompt_tokens=1, max_new_tokens=1, max_question_tokens=0)
        for name, smallest in least.items():
            check_integer(name, getattr(self, name), least=smallest)

    @property
    def longest(self) -> int:
        """Most tokens of a row before its first new one."""
        return self.max_prompt_tokens + self.max_question_tokens

    def check_text(
        self, texts: Sequence[str], field: Literal["prompt", "document"], *, behind: bool = False
    ) -> None:
        """Raises TooLong if texts, together, certainly have too many tokens; tokenizes nothing.

        `behind` says that they are a prompt behind a document.
        """
        name = "max_question_tokens" if behind else "max_prompt_tokens"
        tokens = getattr(self, name)
        most = max(tokens * self.token_bytes, SMALL_TEXT)
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        if size > most:
            raise TooLong(
                f"the {field} has {size} bytes, more than the {most} that {name} = {tokens} tokens "
                "can stand for",
                field,
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedRequest:
    """A request in token ids, checked against an engine's limits."""

    tokens: list[int]  # of document and prompt
    document: int  # how many of them are the document's; 0 without one
    max_new_tokens: int
    sampling: Sampling
    seed: int
    eos_ids: tuple[int, ...]
    logprobs: int | None = None
    pin: tuple[tuple[int, int], ...] = ()  # spans of the document's tokens, or of the prompt's
    tenant: str = ""
    grammar: CompiledGrammar | None = None
    policy: str | None = None
    draft: bool = True

    @property
    def cut(self) -> list[int]:
        """The tokens that are read and cut: the document's, or without one all."""
        return self.tokens[: self.document or None]

    def check(self, limits: Limits) -> None:
        """Raises ValueError (`TooLong`) with the limit that the request exceeds."""
        first = self.document or len(self.tokens)
        if first > limits.max_prompt_tokens:
            name = "document" if self.document else "prompt"
            raise TooLong(
                f"the {name} has {first} tokens, more than max_prompt_tokens = "
                f"{limits.max_prompt_tokens}",
                name,
            )
        question = len(self.tokens) - self.document
        if self.document and question > limits.max_question_tokens:
            raise TooLong(
                f"the prompt after the document has {question} tokens, more than "
                f"max_question_tokens = {limits.max_question_tokens}",
                "prompt",
            )
        self._check_pin(limits)
        for name in ("max_new_tokens", "seed"):
            if not isinstance(value := getattr(self, name), int | np.integer):
                raise RequestError(f"{name} must be an integer, not {value!r}", name)
        if not 1 <= self.max_new_tokens <= limits.max_new_tokens:
            raise RequestError(
                f"a request may ask for 1 to max_new_tokens = {limits.max_new_tokens} tokens, "
                f"not {self.max_new_tokens}",
                "max_new_tokens",
            )
        try:
            check_alternatives(self.logprobs)
        except ValueError as error:
            raise RequestError(str(error), "logprobs") from None
        if len(self.eos_ids) > MAX_EOS_IDS:
            raise RequestError(
                f"{len(self.eos_ids)} tokens in eos_ids and stop_token_ids exceed the "
                f"{MAX_EOS_IDS} of a row",
                "stop_token_ids",
            )

    def _check_pin(self, limits: Limits) -> None:
        try:
            pinned = int(pin_mask([self.pin], np.asarray([self.cut])).sum())
        except ValueError as error:
            raise RequestError(str(error), "pin") from None
        most = limits.max_pinned_tokens
        if most is not None and pinned > most:
            raise RequestError(
                f"{pinned} tokens are pinned and the budget is {most} entries per layer and head: "
                "pin less",
                "pin",
            )


class ActiveRequest:
    """A request on its way through an engine, from the queue to its result."""

    def __init__(
        self, id: int, request: Request, encoded: EncodedRequest, tokenizer: Tokenizer | None
    ):
        self.id = id
        self.encoded = encoded
        self.on_event = request.on_event
        self.grammar = None if encoded.grammar is None else encoded.grammar.begin()
        self.first_mask = None if encoded.grammar is None else encoded.grammar.first_mask
        self.row: int | None = None
        self.steps = 0
        self.reused_tokens = 0
        self.kept_entries: float | None = None
        self._logprobs: Logprobs | None = None
        self._pieces: list[str] = []
        self._told = 0  # output tokens that were in an event
        self.output = OutputRow(
            tokenizer, prompt=encoded.tokens, stop=request.stop, end_ids=encoded.eos_ids,
            on_text=self._pieces.append,
        )  # fmt: skip
        self._has_text = tokenizer is not None
        self._submitted = time.perf_counter()
        self._started: float | None = None
        self._first: float | None = None

    def start(self) -> None:
        """Notes that the prompt begins to be read."""
        self._started = self._elapsed()

    def take(self, tokens: np.ndarray, logprobs: Logprobs | None = None) -> None:
        """Takes all output tokens so far, int32 [count], and their log-probabilities.

        Raises ValueError if the tokens cannot be decoded.
        """
        self._logprobs = logprobs
        with panics_as_errors("the output cannot be decoded"):
            self.output.feed(tokens[len(self.output.tokens) :].tolist())

    def news(self, result: Result | None = None) -> Event:
        """The tokens and text that no event has had yet."""
        begin, self._told = self._told, len(self.output.tokens)
        tokens, text = self.output.tokens[begin:], "".join(self._pieces)
        self._pieces.clear()
        if tokens and self._first is None:
            self._first = self._elapsed()
        return Event(
            id=self.id, tokens=tokens, text=text, offsets=self.output.offsets[begin:],
            logprobs=self._logprobs_from(begin), result=result,
        )  # fmt: skip

    def _logprobs_from(self, begin: int) -> Logprobs | None:
        """Those of the output tokens from `begin` on."""
        if self._logprobs is None:
            return None
        return self._logprobs.between(begin, len(self.output.tokens), self.encoded.logprobs)

    def end(self, why: Literal["cancelled"] | BaseException | None) -> Event:
        """The last event; with `why` None, the output ended by itself."""
        try:
            with panics_as_errors("the output cannot be decoded"):
                self.output.close()
        except Exception as error:
            why = why or error
        finish, error = self.output.finish(), None
        if isinstance(why, BaseException):
            finish, error = "error", f"{type(why).__name__}: {why}"
        elif why is not None:
            finish = why
        event = self.news()
        result = Result(
            id=self.id,
            tokens=list(self.output.tokens),
            text=self.output.text if self._has_text else None,
            offsets=list(self.output.offsets),
            logprobs=self._logprobs_from(0),
            finish=finish,
            error=error,
            prompt_tokens=len(self.encoded.tokens),
            reused_tokens=self.reused_tokens,
            kept_entries=self.kept_entries,
            steps=self.steps,
            timing=RequestTiming(
                started_s=self._started, first_token_s=self._first, ended_s=self._elapsed()
            ),
        )
        return dataclasses.replace(event, result=result)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._submitted
