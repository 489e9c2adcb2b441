"""/tokenize: the token ids of a prompt or a chat, exactly as a request with it would be read."""

import asyncio

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.engine.requests import TooLong
from lookahead_jax.server.endpoint import check_model
from lookahead_jax.server.errors import Gone, Refused
from lookahead_jax.server.prompts import token_ids
from lookahead_jax.server.request_log import record_of
from lookahead_jax.server.schema import TokenizeBody, parse_body
from lookahead_jax.server.service import Service
from lookahead_jax.server.wire import discard_body, read_body


class Tokenizing:
    """An ASGI application; `plain` as for `Endpoint`."""

    def __init__(self, service: Service, tokenizer: Tokenizer, *, name: str, plain: bool):
        self._service = service
        self._tokenizer = tokenizer
        self._name = name
        self._plain = plain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        unread = True
        try:
            self._service.check()
            content = await read_body(scope, receive, self._service)
            unread = False
            answer = await asyncio.to_thread(self._answer, content)
        except Gone:
            record_of(scope).error = "client_left"
            return
        except Refused as refused:
            record_of(scope).error = refused.code
            if unread:
                await discard_body(scope, receive)
            answer = refused.response()
        await answer(scope, receive, send)

    def _answer(self, content: bytes) -> JSONResponse:
        """In another thread."""
        body = parse_body(TokenizeBody, content)
        check_model(body.model, self._name)
        limits = self._service.engine.limits
        field = "prompt" if body.messages is None else "messages"
        try:
            ids = token_ids(body, tokenizer=self._tokenizer, limits=limits, plain=self._plain)
        except ValueError as error:
            code = "context_length_exceeded" if isinstance(error, TooLong) else None
            raise Refused(400, str(error), param=field, code=code) from None
        return JSONResponse(
            {"tokens": ids, "count": len(ids), "max_prompt_tokens": limits.max_prompt_tokens}
        )
