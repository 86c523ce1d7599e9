"""The TextGeneration service over gRPC. The deadline and the life of a call are the request's."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import Any

import grpc
import grpc.aio
import structlog

from gateway.grpc_messages import (
    event_to_proto,
    model_to_proto,
    request_from_proto,
    text_prompt,
)
from gateway.service import GenerationService
from protos import text_generation_pb2 as pb
from protos import text_generation_pb2_grpc as pb_grpc
from stagemesh.errors import InternalError, RequestCancelled, StageMeshError
from stagemesh.logs import request_context
from stagemesh.rpc import abort_with

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["TextGeneration"].full_name

_log = structlog.get_logger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]


class TextGenerationServicer(pb_grpc.TextGenerationServicer):
    """Maps every StageMeshError to its status; anything else is logged and is INTERNAL."""

    def __init__(self, service: GenerationService, slow_client_timeout_s: float) -> None:
        self._service = service
        self._slow_client_timeout_s = slow_client_timeout_s
        self._numbers = itertools.count(1)

    async def Generate(  # noqa: N802 - the name of the rpc
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        """Writes rather than yields, so that a cancelled call ends what it was waiting in."""
        request_id = request.request_id or f"grpc-{next(self._numbers)}"
        with request_context(request_id):
            try:
                await self._generate(request, request_id, context)
            except grpc.aio.AbortError:
                raise  # it was told already
            except Exception as error:
                await abort_with(context, _known(error))

    async def _generate(
        self, request: pb.GenerateRequest, request_id: str, context: Context
    ) -> None:
        asked = request_from_proto(request, request_id, context.time_remaining())
        token_text = self._service.model.tokenizer.token_text
        async with self._service.accept([asked]) as (choice,):
            try:
                async for event in choice.events():
                    await self._write(context, event_to_proto(event, token_text, asked.output))
            except _SlowClient as error:
                choice.close()
                # The status waits behind what was not read. Until then the call keeps its place
                # among those that the gateway holds, so that these are bounded too.
                with contextlib.suppress(grpc.aio.InternalError):  # it went away instead
                    await abort_with(context, error)

    async def _write(self, context: Context, response: pb.GenerateResponse) -> None:
        """Waits while the client's window is full, which is all that is buffered beside it."""
        try:
            async with asyncio.timeout(self._slow_client_timeout_s):
                await context.write(response)
        except TimeoutError:
            raise _SlowClient(
                f"the client took nothing for {self._slow_client_timeout_s:g} s"
            ) from None

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: Context
    ) -> pb.GetModelResponse:
        try:
            self._service.names.adapter(request.model)
        except StageMeshError as error:
            await abort_with(context, error)
        view = self._service.mesh.view
        answer = model_to_proto(self._service.model, view.identity, self._service.max_model_len)
        answer.model = request.model or answer.model
        answer.adapters.extend(self._service.names.adapters)
        return answer

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: Context
    ) -> pb.TokenizeResponse:
        try:
            self._service.names.adapter(request.model)
            add = request.add_special_tokens if request.HasField("add_special_tokens") else None
            prompt = text_prompt(request, add)
            token_ids, _ = await self._service.preparer.prompt_token_ids(prompt)
        except Exception as error:
            await abort_with(context, _known(error))
        return pb.TokenizeResponse(token_ids=token_ids, max_model_len=self._service.max_model_len)

    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        try:
            self._service.names.adapter(request.model)
            text = await self._service.preparer.decode(
                request.token_ids, skip_special=request.skip_special_tokens
            )
        except Exception as error:
            await abort_with(context, _known(error))
        return pb.DetokenizeResponse(text=text)


class _SlowClient(RequestCancelled):
    """The client does not read."""


def _known(error: Exception) -> StageMeshError:
    if isinstance(error, StageMeshError):
        return error
    _log.error("a call failed", exc_info=error)
    return InternalError("the gateway failed at this request")
