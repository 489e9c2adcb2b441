"""Answers in OpenAI's form: whole ones, chunks of streams, and token counts."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.engine.requests import Event, Result
from lookahead_jax.server.token_logprobs import chat_logprobs, completion_logprobs
from lookahead_jax.server.tools import CallReader, ToolUse

_FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The parts of one answer; `chat` selects the form of the chat endpoint.

    `counted` says that a stream ends with the counts of tokens, `tools` how answers call functions.
    """

    chat: bool
    model: str
    tokenizer: Tokenizer
    counted: bool = False
    tools: ToolUse | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    _readers: dict[int, CallReader] = field(default_factory=dict, init=False)  # of a stream

    def whole(self, results: Sequence[Result], choices: int) -> dict[str, Any]:
        """All choices at once; the first `choices` belong to the first prompt, and so on."""
        return self._object("") | {
            "choices": [self._whole_choice(i, result) for i, result in enumerate(results)],
            "usage": usage(results, choices),
        }

    def begin(self, choices: int) -> list[dict[str, Any]]:
        """The chunks of a stream before any text."""
        first = {"role": "assistant", "content": ""}
        return [self._chunk(i, delta=first) for i in range(choices)] if self.chat else []

    def piece(self, index: int, event: Event) -> list[dict[str, Any]]:
        """The chunk with more text of one choice, and the log-probabilities of its tokens, if any.

        With tools, text that may belong to a call is held back.
        """
        text, logprobs = event.text, self._logprobs(event) if event.tokens else None
        delta = {"content": text} if text else {}
        if self.tools is not None:
            delta = self._readers.setdefault(index, self.tools.reader()).feed(text)
        if not delta and logprobs is None:
            return []
        return [self._chunk(index, delta=delta or {"content": ""}, text=text, logprobs=logprobs)]

    def end(self, index: int, result: Result) -> dict[str, Any]:
        """The last chunk of one choice."""
        delta, finish = {}, _FINISH[result.finish]
        if self.tools is not None:
            reader = self._readers.setdefault(index, self.tools.reader())
            delta = reader.close()
            finish = _finish(result, reader)
        return self._chunk(index, delta=delta, text="", finish=finish)

    def counts(self, results: Sequence[Result], choices: int) -> dict[str, Any]:
        """The chunk after the last choice, for clients that ask for counts."""
        return self._object(".chunk") | {"choices": [], "usage": usage(results, choices)}

    def _object(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _whole_choice(self, index: int, result: Result) -> dict[str, Any]:
        text, finish = result.text or "", _FINISH[result.finish]
        content: dict[str, Any] = {"text": text}
        if self.chat:
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if self.tools is not None:
                reader = self.tools.reader()
                message |= _message(reader, text)
                finish = _finish(result, reader)
            content = {"message": message}
        return {
            "index": index, **content, "logprobs": self._logprobs(result), "finish_reason": finish,
        }  # fmt: skip

    def _logprobs(self, part: Event | Result) -> dict[str, Any] | None:
        """The log-probabilities of an event's or a result's tokens, if they were asked for."""
        if part.logprobs is None:
            return None
        if self.chat:
            return chat_logprobs(part.tokens, part.logprobs, self.tokenizer)
        return completion_logprobs(part.tokens, part.offsets, part.logprobs, self.tokenizer)

    def _chunk(
        self,
        index: int,
        *,
        delta: Mapping[str, Any],
        text: str = "",
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        content = {"delta": delta} if self.chat else {"text": text}
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        counts = {"usage": None} if self.counted else {}
        return self._object(".chunk") | {"choices": [choice], **counts}


def _message(reader: CallReader, text: str) -> dict[str, Any]:
    """Content and call of a whole answer."""
    parts = [reader.feed(text), reader.close()]
    content = "".join(part.get("content", "") for part in parts)
    if not reader.called:
        return {"content": content}
    (call, *more) = [call for part in parts for call in part.get("tool_calls", ())]
    del call["index"]
    for later in more:
        call["function"]["arguments"] += later["function"]["arguments"]
    return {"content": content or None, "tool_calls": [call]}


def _finish(result: Result, reader: CallReader) -> str:
    """Why an answer ended that might call a function; a call may also have been cut short."""
    whole = reader.called and result.finish == "eos"
    return "tool_calls" if whole else _FINISH[result.finish]


def usage(results: Sequence[Result], choices: int) -> dict[str, Any]:
    """Token counts; a prompt with several choices counts once."""
    prompts = sum(result.prompt_tokens for result in results[::choices])
    generated = sum(len(result.tokens) for result in results)
    reused = sum(result.reused_tokens for result in results[::choices])
    kept = sum(result.kept_entries or 0.0 for result in results[::choices])
    return {
        "prompt_tokens": prompts,
        "completion_tokens": generated,
        "total_tokens": prompts + generated,
        "prompt_tokens_details": {"cached_tokens": reused},
        "lookahead": {"kept_entries": round(kept, 1), "steps": sum(r.steps for r in results)},
    }
