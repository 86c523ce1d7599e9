"""Errors as OpenAI's API shows them: one body for every way in which a call can go wrong."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from stagemesh.errors import InternalError, InvalidRequest, StageMeshError, outward

_DEFAULT_RETRY_AFTER_S = 1.0
_COME_AGAIN = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


def error_body(error: StageMeshError) -> dict[str, Any]:
    """`retry_after_s` is in the body too, since the last event of a stream has no header."""
    param = error.param if isinstance(error, InvalidRequest) else None
    body = _body(error.message, outward(error).openai_type, param, error.code)
    if error.retry_after_s is not None:
        body["error"]["retry_after_s"] = round(error.retry_after_s, 3)
    return body


def error_response(error: StageMeshError) -> JSONResponse:
    status = outward(error).http
    headers = {}
    if status in _COME_AGAIN:
        retry_after_s = error.retry_after_s or _DEFAULT_RETRY_AFTER_S
        headers["Retry-After"] = str(math.ceil(retry_after_s))
    return JSONResponse(error_body(error), status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Every error of the app becomes a body of this kind, also those of the framework."""

    @app.exception_handler(StageMeshError)
    async def known(_: Request, error: StageMeshError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def of_framework(request: Request, error: HTTPException) -> JSONResponse:
        status = HTTPStatus(error.status_code)
        message = f"{status.phrase}: {request.method} {request.url.path}"
        code = status.name.lower()
        body = _body(message, "invalid_request_error", None, code)
        return JSONResponse(body, status, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        return error_response(InternalError("the gateway failed at this request"))


def _body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
