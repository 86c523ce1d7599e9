"""Reads bodies: bounded while they come, JSON, checked against a schema."""

from __future__ import annotations

import asyncio
import time
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect

from gateway.http.common import HttpContext
from stagemesh.errors import InvalidRequest, RequestCancelled, RequestTooLarge

T = TypeVar("T", bound=BaseModel)

# A body over the limit is read on for a while and thrown away, since a client that is still sending
# would see a broken connection rather than the answer.
_MAX_DISCARDED_BYTES = 2**28
_MAX_DISCARD_S = 10.0
# Parsing less than this takes less than handing it to a thread.
_INLINE_BYTES = 2**16


async def read_body(request: Request, schema: type[T], context: HttpContext) -> T:
    """Raises InvalidRequest, naming the field, RequestTooLarge, and RequestCancelled."""
    data = await _read_bounded(request, context)
    if len(data) <= _INLINE_BYTES:
        return _parse(schema, data)
    return await asyncio.to_thread(_parse, schema, data)


async def _read_bounded(request: Request, context: HttpContext) -> bytes:
    max_bytes, patience_s = context.max_body_bytes, context.slow_client_timeout_s
    chunks: list[bytes] = []
    num_bytes = 0
    give_up = time.monotonic() + _MAX_DISCARD_S
    stream = request.stream()
    try:
        while (chunk := await asyncio.wait_for(anext(stream, None), patience_s)) is not None:
            num_bytes += len(chunk)
            if num_bytes <= max_bytes:
                chunks.append(chunk)
                continue
            chunks.clear()
            if num_bytes > _MAX_DISCARDED_BYTES or time.monotonic() > give_up:
                break
    except ClientDisconnect as error:
        raise RequestCancelled("the client went away while it was sending") from error
    except TimeoutError as error:
        raise RequestCancelled(f"nothing of the body came for {patience_s:g} s") from error
    if num_bytes > max_bytes:
        raise RequestTooLarge(f"the body is larger than {max_bytes} bytes")
    return b"".join(chunks)


def _parse(schema: type[T], data: bytes) -> T:
    try:
        return schema.model_validate_json(data)
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False, include_input=False)[0]) from None


def _invalid(detail: ErrorDetails) -> InvalidRequest:
    if detail["type"] == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {detail['msg']}")
    if not detail["loc"]:
        return InvalidRequest(f"the body is not what is wanted: {detail['msg']}")
    path = _path(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return InvalidRequest(f"there is no option {path}", param=path)
    if detail["type"] == "missing":
        return InvalidRequest(f"{path} is missing", param=path)
    return InvalidRequest(f"{path}: {detail['msg']}", param=path)


def _path(location: tuple[int | str, ...]) -> str:
    """The field's place in the body; alternatives of a type are no part of it."""
    first, *rest = location
    inner = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
    return str(first) + "".join(part for part in inner if "[" not in part[1:])
