"""The routes, and errors outside the endpoints."""

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.server.endpoint import Endpoint, check_model, tokenizer_of
from lookahead_jax.server.entrance import Entrance
from lookahead_jax.server.errors import Refused
from lookahead_jax.server.page import page
from lookahead_jax.server.request_log import record_of
from lookahead_jax.server.schema import ChatBody, CompletionBody
from lookahead_jax.server.service import Service
from lookahead_jax.server.tokenizing import Tokenizing


def make_app(
    service: Service,
    model: Model,
    *,
    name: str,
    api_keys: Sequence[str],
    allow_special_tokens: bool,
    drafter: str,
    with_page: bool,
) -> ASGIApp:
    """The whole server: OpenAI's endpoints for one model, /tokenize, /health, /ready and /metrics.

    With `api_keys`, everything but /health, /ready and the page requires one.
    `allow_special_tokens` lets control tokens that clients spell in texts act as such; `drafter` is
    the name of the engine's; `with_page` adds the chat page at /. The endpoints stand inside
    because they share these arguments.
    """
    limits = service.engine.limits
    entry = {
        "id": name, "object": "model", "created": int(time.time()), "owned_by": "lookahead_jax",
        "max_model_len": limits.longest + limits.max_new_tokens,
        "max_prompt_tokens": limits.max_prompt_tokens, "max_new_tokens": limits.max_new_tokens,
        "policies": list(service.engine.policies), "drafters": sorted({"none", drafter}),
    }  # fmt: skip

    async def models(request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [entry]})

    async def one_model(request: HttpRequest) -> Response:
        check_model(request.path_params["name"], name)
        return JSONResponse(entry)

    async def health(request: HttpRequest) -> Response:
        service.check()
        return JSONResponse({"status": "ok"})

    async def ready(request: HttpRequest) -> Response:
        service.check_room()
        return JSONResponse({"status": "ready"})

    async def embeddings(request: HttpRequest) -> Response:
        raise Refused(
            404, "embeddings are not supported: use /v1/completions or /v1/chat/completions",
            code="unsupported_endpoint",
        )  # fmt: skip

    async def metrics(request: HttpRequest) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.stop()

    plain = not allow_special_tokens
    endpoint = partial(Endpoint, service, model, name=name, plain=plain, drafter=drafter)
    tokenizer = tokenizer_of(model)
    tokenizing = Tokenizing(service, tokenizer, name=name, plain=plain)
    routes = [
        Route("/v1/completions", endpoint(kind=CompletionBody), methods=["POST"]),
        Route("/v1/chat/completions", endpoint(kind=ChatBody), methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/tokenize", tokenizing, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        *([Route("/", page)] if with_page else []),
    ]
    handlers: dict[Any, Any] = {Refused: _refused, HTTPException: _http_error, Exception: _failed}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False
    return Entrance(app, service.metrics, {route.path for route in routes}, api_keys)


async def _refused(request: HttpRequest, refused: Refused) -> Response:
    record_of(request.scope).error = refused.code
    return refused.response()


async def _http_error(request: HttpRequest, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return Refused(error.status_code, message, headers=error.headers).response()


async def _failed(request: HttpRequest, error: Exception) -> Response:
    return Refused(500, "the server failed; its log says why").response()
