"""/v1/completions and /v1/chat/completions: from a body to requests, from events to an answer."""

import asyncio
from collections.abc import AsyncIterator

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.engine.requests import Event, Request, Result, TooLong
from lookahead_jax.server.answers import Answer
from lookahead_jax.server.errors import Gone, Refused
from lookahead_jax.server.schema import ChatBody, CompletionBody, parse
from lookahead_jax.server.service import Call, Service
from lookahead_jax.server.wire import EventStream, discard_body, read_body, watch

DEFAULT_MAX_TOKENS = 128  # as `lookahead generate`

AnyBody = CompletionBody | ChatBody


class Endpoint:
    """An ASGI application that continues prompts; `kind` says what its bodies look like."""

    def __init__(self, service: Service, model: Model, name: str, kind: type[AnyBody]):
        if model.tokenizer is None:
            raise ValueError(f"{model.path} has no tokenizer.json, and a server answers in text")
        self._service = service
        self._tokenizer = model.tokenizer
        self._name = name
        self._kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits, stream, unread = self._service.limits, EventStream(send), True
        try:
            with self._service.call() as call:
                call.end_after(limits.request_seconds, "the request was not done in", "timeout")
                content = await read_body(scope, receive, limits.max_body_bytes)
                unread = False
                leaving = asyncio.create_task(watch(receive, call))
                try:
                    body = await asyncio.to_thread(parse, self._kind, content)
                    answer = await self._answer(call, body, stream)
                finally:
                    leaving.cancel()
            if answer is not None:
                await answer(scope, receive, send)
        except Gone:
            pass
        except Refused as refused:
            if stream.begun:
                await stream.fail(refused)
                return
            if unread:
                await discard_body(scope, receive)
            await refused.response()(scope, receive, send)

    async def _answer(self, call: Call, body: AnyBody, stream: EventStream) -> JSONResponse | None:
        """The answer; None if it went through the stream."""
        check_model(body.model, self._name)
        count = body.n * (len(body.prompt) if isinstance(body, CompletionBody) else 1)
        await self._submit(call, body, count)
        answer = Answer(chat=isinstance(body, ChatBody), model=self._name)
        results: dict[int, Result] = {}
        async for index, event in _events(call, count, self._service.limits.queue_seconds):
            if event.result is not None:
                results[index] = event.result
            if not body.stream:
                continue
            if not stream.begun:
                await stream.put(*answer.begin(count))
            if event.text:
                await stream.put(answer.piece(index, event.text))
            if event.result is not None:
                await stream.put(answer.end(index, event.result))
        ordered = [results[i] for i in range(count)]
        if not body.stream:
            return JSONResponse(answer.whole(ordered, body.n))
        if body.include_usage:
            await stream.put(answer.counts(ordered, body.n))
        await stream.put("[DONE]")
        await stream.close()

    async def _submit(self, call: Call, body: AnyBody, count: int) -> None:
        most = self._service.engine.limits.max_new_tokens
        given = body.max_tokens
        if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
            given = body.max_completion_tokens
        if given is not None and given > most:
            raise Refused(
                400, f"max_tokens: at most {most} here, not {given}", param="max_tokens",
                code="invalid_value",
            )  # fmt: skip
        tokens = min(DEFAULT_MAX_TOKENS, most) if given is None else given
        try:
            await call.submit(count, lambda: _requests(body, tokens, self._tokenizer))
        except ValueError as error:
            field = error.field if isinstance(error, TooLong) else "prompt"
            raise Refused(
                400,
                str(error),
                param="messages" if isinstance(body, ChatBody) else field,
                code="context_length_exceeded" if isinstance(error, TooLong) else None,
            ) from error


def check_model(given: str, name: str) -> None:
    """Raises `Refused` with status 404 for any model but the one that is served."""
    if given != name:
        raise Refused(
            404, f"there is no model {given!r} here, only {name!r}", param="model",
            code="model_not_found",
        )  # fmt: skip


def _requests(body: AnyBody, tokens: int, tokenizer: Tokenizer) -> list[Request]:
    """One request per prompt and choice; the choices of a prompt have seeds in a row."""
    document = None
    if isinstance(body, CompletionBody):
        prompts, document = body.prompt, body.document
    else:
        text = tokenizer.render_chat([message.model_dump() for message in body.messages])
        prompts = [tokenizer.encode(text, special=False)]
    return [
        Request(
            prompt=prompt,
            document=document,
            max_new_tokens=tokens,
            sampling=body.sampling,
            seed=body.seed + choice,
            stop=body.stop,
        )
        for prompt in prompts
        for choice in range(body.n)
    ]


async def _events(call: Call, count: int, seconds: float) -> AsyncIterator[tuple[int, Event]]:
    """News until all `count` requests have ended; the first within `seconds`."""
    waiting = call.end_after(seconds, "there was no token within", "queue_timeout")
    running = count
    while running:
        index, event = await call.next()
        waiting.cancel()
        if event.result is not None:
            running -= 1
            if event.result.finish not in ("eos", "stop", "length"):
                raise Refused(500, "the engine failed; the server's log says why")
        yield index, event
