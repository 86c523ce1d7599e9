"""Puts a load on a mesh of ours by gRPC `Generate`. Token counts are of the token ids that came."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from protos import text_generation_pb2 as pb
from stagemesh.bench.client import Delivery, News, Served, Usage
from stagemesh.bench.prompts import token_prompt
from stagemesh.bench.workload import Ask
from stagemesh.cli.client import RPC_TIMEOUT_S, connection, text_generation
from stagemesh.errors import ProtocolError
from stagemesh.rpc import error_from_rpc


class GrpcClient:
    """All streams share one connection, as those of a service of its user's would."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        model: pb.GetModelResponse,
        *,
        temperature: float,
        timeout_s: float,
    ) -> None:
        self.served = Served(model.model, model.max_model_len)
        self._stub = text_generation(channel)
        self._vocab_size = model.vocab_size
        self._temperature = temperature
        self._timeout_s = timeout_s

    def prepare(self, ask: Ask) -> pb.GenerateRequest:
        return pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=token_prompt(ask, self._vocab_size)),
            sampling=pb.SamplingParams(temperature=self._temperature, seed=ask.seed),
            stopping=pb.StoppingCriteria(max_tokens=ask.output_tokens, ignore_eos=True),
        )

    async def stream(self, prepared: Any) -> AsyncGenerator[News, None]:
        call = self._stub.Generate(prepared, timeout=self._timeout_s)
        ended = False
        try:
            async for response in call:
                if response.WhichOneof("event") == "summary":
                    ended, usage = True, response.summary.usage
                    yield Usage(
                        usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens
                    )
                elif response.delta.token_ids:
                    yield Delivery(len(response.delta.token_ids))
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None
        finally:
            call.cancel()
        if not ended:
            raise ProtocolError("the stream ended without a summary")


@asynccontextmanager
async def grpc_client(
    address: str, *, temperature: float, timeout_s: float
) -> AsyncIterator[GrpcClient]:
    """Raises PeerLost where no gateway answers."""
    async with connection(address, "gateway") as channel:
        model = await text_generation(channel).GetModel(
            pb.GetModelRequest(), timeout=RPC_TIMEOUT_S, wait_for_ready=False
        )
        yield GrpcClient(channel, model, temperature=temperature, timeout_s=timeout_s)
