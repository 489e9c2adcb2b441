"""What an engine is asked, and what it answers."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Literal

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.sampling import GREEDY, Sampling
from lookahead_jax.generation.inputs import encode_prompts, end_ids
from lookahead_jax.generation.output_text import FinishReason, OutputRow
from lookahead_jax.prefilling.batching import pad_batch

MAX_EOS_IDS = 16  # room in every row's state; checkpoints name up to five


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how to continue it, in the words of `generate`."""

    prompt: str | Sequence[int]
    max_new_tokens: int
    document: str | Sequence[int] | None = None
    """Read and cut on its own, as if nothing followed; the prompt is read behind what was kept,
    and all of it stays. Other requests with the same document need not read it again."""
    sampling: Sampling = GREEDY
    seed: int = 0
    stop: Sequence[str] = ()
    eos_ids: Sequence[int | str] | None = None
    """Tokens that end the row, by id or content; None: the engine's."""
    stop_token_ids: Sequence[int | str] = ()
    """More such tokens, beside `eos_ids`."""
    on_event: Callable[["Event"], None] | None = None
    """Receives the request's events in the thread that steps; its errors end the request."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestTiming:
    """Seconds since the request was submitted; None for what did not happen."""

    started_s: float | None  # its prompt began to be read
    first_token_s: float | None  # its first token was handed out
    ended_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A request that has ended, with all that it emitted until then."""

    id: int
    tokens: list[int]  # an end-of-sequence token included
    text: str | None  # None without a tokenizer; cut before a stop string
    finish: FinishReason | Literal["cancelled", "error"]
    error: str | None  # why, if finish is "error"
    prompt_tokens: int
    reused_tokens: int  # of the prompt, those that an earlier request had read
    steps: int  # forwards of the model after the prompt; one emits one token or more
    timing: RequestTiming


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """News of one request: new tokens, new text, or its end."""

    id: int
    tokens: list[int]
    text: str  # what has become certain; it may lag behind the tokens
    result: Result | None  # the last event of every request has one


class TooLong(ValueError):
    """More tokens than an engine has room for, in the request's `field`."""

    def __init__(self, message: str, field: Literal["prompt", "document"]):
        super().__init__(message)
        self.field: Literal["prompt", "document"] = field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the rows of an engine are sized for."""

    max_prompt_tokens: int
    max_new_tokens: int
    max_question_tokens: int

    @property
    def longest(self) -> int:
        """Tokens that a row may hold before it emits any."""
        return self.max_prompt_tokens + self.max_question_tokens

    def check(
        self, request: Request, tokens: Sequence[int], document: int, eos_ids: Sequence[int]
    ) -> None:
        """Raises ValueError (`TooLong`) with the limit that a request goes beyond."""
        first = document or len(tokens)
        if first > self.max_prompt_tokens:
            name = "document" if document else "prompt"
            raise TooLong(
                f"the {name} has {first} tokens, more than max_prompt_tokens = "
                f"{self.max_prompt_tokens}",
                name,
            )
        if document and len(tokens) - document > self.max_question_tokens:
            raise TooLong(
                f"the prompt behind the document has {len(tokens) - document} tokens, more than "
                f"max_question_tokens = {self.max_question_tokens}",
                "prompt",
            )
        if not 1 <= request.max_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"a request may ask for 1 to max_new_tokens = {self.max_new_tokens} tokens, "
                f"not {request.max_new_tokens}"
            )
        if len(eos_ids) > MAX_EOS_IDS:
            raise ValueError(f"{len(eos_ids)} eos_ids are more than the {MAX_EOS_IDS} of a row")


class Job:
    """A request on its way through an engine.

    Raises ValueError for a request that cannot be served.
    """

    def __init__(
        self, id: int, request: Request, model: Model, limits: Limits, eos_ids: Sequence[int]
    ):
        if request.document is None:
            document, (prompt,) = [], encode_prompts(model, [request.prompt])
        else:
            (document,) = encode_prompts(model, [request.document])
            (prompt,) = encode_prompts(model, [request.prompt], special=False)
        tokens = document + prompt
        own = eos_ids if request.eos_ids is None else request.eos_ids
        ends = end_ids(model, own, request.stop_token_ids)
        limits.check(request, tokens, len(document), ends)
        pad_batch([tokens], config=model.config)  # checks the ids
        self.id = id
        self.request = request
        self.tokens = tokens
        self.document = len(document)  # tokens of the document, 0 if there is none
        self.eos_ids = ends
        self.row: int | None = None
        self.steps = 0
        self.reused_tokens = 0
        self._pieces: list[str] = []
        self._told = 0  # output tokens that were in an event
        self.output = OutputRow(
            model.tokenizer, prompt=tokens, stop=request.stop, on_text=self._pieces.append
        )
        self._has_text = model.tokenizer is not None
        self._submitted = time.perf_counter()
        self._started: float | None = None
        self._first: float | None = None

    def start(self) -> None:
        """The prompt is about to be read."""
        self._started = self._elapsed()

    def news(self, result: Result | None = None) -> Event:
        """What the output has gained since the last time."""
        tokens, text = self.output.tokens[self._told :], "".join(self._pieces)
        self._told += len(tokens)
        self._pieces.clear()
        if tokens and self._first is None:
            self._first = self._elapsed()
        return Event(id=self.id, tokens=tokens, text=text, result=result)

    def end(self, why: Literal["cancelled"] | Exception | None) -> Event:
        """The last event; `why` None is an end of the output's own."""
        self.output.close()
        finish, error = self.output.finish(self.eos_ids), None
        if isinstance(why, Exception):
            finish, error = "error", f"{type(why).__name__}: {why}"
        elif why is not None:
            finish = why
        event = self.news()
        result = Result(
            id=self.id,
            tokens=list(self.output.tokens),
            text=self.output.text if self._has_text else None,
            finish=finish,
            error=error,
            prompt_tokens=len(self.tokens),
            reused_tokens=self.reused_tokens,
            steps=self.steps,
            timing=RequestTiming(
                started_s=self._started, first_token_s=self._first, ended_s=self._elapsed()
            ),
        )
        return dataclasses.replace(event, result=result)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._submitted
