"""The routes of the HTTP front."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from gateway.http.chat import create_chat_completion
from gateway.http.common import HttpContext
from gateway.http.completions import create_completion
from gateway.http.errors import add_error_handlers
from gateway.http.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from gateway.http.tokens import detokenize, tokenize
from stagemesh import __version__


def make_app(context: HttpContext) -> FastAPI:
    app = FastAPI(title="StageMesh", version=__version__)
    add_error_handlers(app)
    _add_generation_routes(app, context)
    _add_model_routes(app, context)
    _add_operator_routes(app, context)
    return app


def _schema(body: type[BaseModel]) -> dict[str, Any]:
    """Shows in /docs what a route reads by itself."""
    content = {"application/json": {"schema": body.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def _add_generation_routes(app: FastAPI, context: HttpContext) -> None:
    @app.post("/v1/completions", response_model=None, openapi_extra=_schema(CompletionBody))
    async def completions(request: Request) -> Response:
        return await create_completion(context, request)

    @app.post("/v1/chat/completions", response_model=None, openapi_extra=_schema(ChatBody))
    async def chat_completions(request: Request) -> Response:
        return await create_chat_completion(context, request)

    @app.post("/tokenize", openapi_extra=_schema(TokenizeBody))
    async def tokenize_text(request: Request) -> dict[str, Any]:
        return await tokenize(context, request)

    @app.post("/detokenize", openapi_extra=_schema(DetokenizeBody))
    async def detokenize_tokens(request: Request) -> dict[str, Any]:
        return await detokenize(context, request)


def _add_model_routes(app: FastAPI, context: HttpContext) -> None:
    started = int(time.time())

    names = context.service.names

    def describe(name: str) -> dict[str, Any]:
        parent = {"parent": names.model} if name != names.model else {}
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "stagemesh",
            "max_model_len": context.service.max_model_len,
            **parent,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [describe(name) for name in (names.model, *names.adapters)],
        }

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        names.adapter(name)
        return describe(name)


def _add_operator_routes(app: FastAPI, context: HttpContext) -> None:
    service = context.service

    @app.get("/health", response_model=None)
    async def health() -> JSONResponse:
        view = service.mesh.view
        state = {"status": "serving" if view.serving else "not serving", "detail": view.detail}
        return JSONResponse(state, 200 if view.serving else 503)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        load = await service.mesh.load()
        return Response(service.metrics.expose(load), media_type=CONTENT_TYPE_LATEST)
