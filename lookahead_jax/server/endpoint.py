"""/v1/completions and /v1/chat/completions: bodies become requests, events become answers."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.decoding.grammar import GrammarError
from lookahead_jax.engine.requests import Event, RequestError, Result, TooLong
from lookahead_jax.server.answers import Answer
from lookahead_jax.server.call import Call
from lookahead_jax.server.errors import Gone, Refused
from lookahead_jax.server.prompts import make_requests
from lookahead_jax.server.request_log import RequestRecord, record_of
from lookahead_jax.server.schema import AnyBody, ChatBody, CompletionBody, parse_body
from lookahead_jax.server.service import Service
from lookahead_jax.server.tools import ToolUse
from lookahead_jax.server.wire import EventStream, discard_body, read_body, watch

DEFAULT_MAX_TOKENS = 128  # as `lookahead generate`


class Endpoint:
    """An ASGI application that continues prompts; `kind` is the type of its bodies.

    `plain` says that control tokens which clients spell in texts are ordinary characters; `drafter`
    is the name of the engine's.
    """

    def __init__(
        self,
        service: Service,
        model: Model,
        *,
        name: str,
        kind: type[AnyBody],
        plain: bool,
        drafter: str,
    ):
        self._service = service
        self._tokenizer = tokenizer_of(model)
        self._name = name
        self._kind = kind
        self._plain = plain
        self._drafter = drafter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream, unread, answer = EventStream(send), True, None
        record = record_of(scope)
        try:
            with self._service.call(record.client) as call:
                seconds = self._service.limits.request_seconds
                call.end_after(seconds, "the request was not done in", "timeout")
                content = await read_body(scope, receive, self._service)
                unread = False
                leaving = asyncio.create_task(watch(receive, call))
                try:
                    body = await asyncio.to_thread(parse_body, self._kind, content)
                    answer = await self._answer(call, body, stream, record)
                finally:
                    leaving.cancel()
        except Gone:
            record.error = "client_left"
            return
        except Refused as refused:
            # A copy has no traceback, which would hold body and tokens until the client has read.
            answer, record.error = refused.copy(), refused.code
        if isinstance(answer, Refused):
            if stream.begun:
                await stream.fail(answer)
                return
            if unread:
                await discard_body(scope, receive)
            answer = answer.response()
        if answer is not None:
            await answer(scope, receive, send)

    async def _answer(
        self, call: Call, body: AnyBody, stream: EventStream, record: RequestRecord
    ) -> JSONResponse | None:
        """The answer; None if it was sent as a stream."""
        check_model(body.model, self._name)
        count = body.n * (len(body.prompt) if isinstance(body, CompletionBody) else 1)
        seconds = self._service.limits.queue_seconds
        waiting = call.end_after(seconds, "there was no token within", "queue_timeout")
        await self._submit(call, body, count, tenant=record.tenant)
        tools = None
        if isinstance(body, ChatBody):
            tools = ToolUse.of(body.tools, body.tool_choice, self._tokenizer)
        answer = Answer(
            chat=isinstance(body, ChatBody), model=self._name, tokenizer=self._tokenizer,
            counted=body.include_usage, tools=tools,
        )  # fmt: skip
        results: dict[int, Result] = {}
        gaps = self._service.metrics.gaps()
        async for index, event in _events(call, count, waiting):
            record.take(event, index // body.n)
            if event.result is not None:
                results[index] = event.result
            if not body.stream:
                continue
            if not stream.begun:
                await stream.put(*answer.begin(count))
            if pieces := answer.piece(index, event):
                gaps.piece(index)
                await stream.put(*pieces)
            if event.result is not None:
                await stream.put(answer.end(index, event.result))
        ordered = [results[i] for i in range(count)]
        if not body.stream:
            return JSONResponse(answer.whole(ordered, body.n))
        if body.include_usage:
            await stream.put(answer.counts(ordered, body.n))
        await stream.put("[DONE]")
        await stream.close()

    async def _submit(self, call: Call, body: AnyBody, count: int, *, tenant: str) -> None:
        most = self._service.engine.limits.max_new_tokens
        given = body.max_tokens
        if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
            given = body.max_completion_tokens
        if given is not None and given > most:
            raise Refused(
                400, f"max_tokens: at most {most}, not {given}", param="max_tokens",
                code="invalid_value",
            )  # fmt: skip
        make = partial(
            make_requests,
            body,
            max_new_tokens=min(DEFAULT_MAX_TOKENS, most) if given is None else given,
            tokenizer=self._tokenizer,
            limits=self._service.engine.limits,
            plain=self._plain,
            drafter=self._drafter,
            tenant=tenant,
        )
        has_tools = isinstance(body, ChatBody) and bool(body.offered)
        compiles = has_tools or body.response_format.type != "text"
        threads = self._service.grammar_threads if compiles else None
        try:
            await call.submit(count, make, threads=threads)
        except ValueError as error:
            field = error.field if isinstance(error, RequestError) else "prompt"
            if field in ("prompt", "pin") and isinstance(body, ChatBody):
                field = "messages"
            if field == "grammar":
                field = "response_format" if body.grammar is not None else "tools"
            code = "context_length_exceeded" if isinstance(error, TooLong) else None
            raise Refused(400, str(error), param=field, code=code) from None


def tokenizer_of(model: Model) -> Tokenizer:
    """The tokenizer; ValueError for a model without one."""
    if model.tokenizer is None:
        raise ValueError(f"{model.path} has no tokenizer.json, and a server answers in text")
    return model.tokenizer


def check_model(given: str, name: str) -> None:
    """Raises `Refused` with status 404 unless `given` names the served model."""
    if given != name:
        raise Refused(
            404, f"there is no model {given!r}, only {name!r}", param="model",
            code="model_not_found",
        )  # fmt: skip


def _failure(result: Result) -> Refused:
    """Why a continuation has no end of its own."""
    kind, _, message = (result.error or "").partition(": ")
    if kind == GrammarError.__name__:
        return Refused(400, message, param="response_format", code="grammar_failed")
    return Refused(500, "the engine failed; the server's log says why", code="engine_error")


async def _events(
    call: Call, count: int, waiting: asyncio.TimerHandle
) -> AsyncIterator[tuple[int, Event]]:
    """Events until all `count` requests have ended; the first one cancels `waiting`."""
    running = count
    while running:
        index, event = await call.next()
        waiting.cancel()
        if event.result is not None:
            running -= 1
        yield index, event
        if event.result is not None and event.result.finish not in ("eos", "stop", "length"):
            raise _failure(event.result)
