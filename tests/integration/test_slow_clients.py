"""Clients that do not read: little is buffered, then they are cut, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import httpx
from support.paths import DEMO_MODEL
from support.scripted_scheduler import Gateway, ScriptedScheduler, scripted_gateway, until

from protos import text_generation_pb2 as pb
from protos import text_generation_pb2_grpc as pb_grpc

# Tokens with so many log-probabilities are some hundred kB of gRPC, and MBs of JSON.
LENGTH = 500
NUM_LOGPROBS = 20
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 2**16)]


@asynccontextmanager
async def gateway_at_token(gate: int) -> AsyncIterator[Gateway]:
    """The mesh holds the last tokens back, so that what does not end by itself can be seen to."""
    async with scripted_gateway(
        DEMO_MODEL, ScriptedScheduler(gate=gate), slow_client_timeout_s=1.0
    ) as gateway:
        yield gateway


def long_request(length: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="Once",
        stopping=pb.StoppingCriteria(max_tokens=length, ignore_eos=True),
        output=pb.OutputOptions(logprobs=NUM_LOGPROBS),
    )


async def test_a_grpc_client_that_stops_reading() -> None:
    async with (
        gateway_at_token(LENGTH - 10) as gateway,
        grpc.aio.insecure_channel(gateway.grpc, options=SMALL_WINDOW) as slow_channel,
        grpc.aio.insecure_channel(gateway.grpc) as channel,
    ):
        scheduler = gateway.scheduler
        slow = pb_grpc.TextGenerationStub(slow_channel).Generate(long_request(LENGTH))
        await slow.read()
        await asyncio.gather(*(finishes(channel, LENGTH - 10) for _ in range(8)))
        await until(lambda: scheduler.aborts == [scheduler.submits[0].request], "the abort")
        error = await failure_of(slow)  # once it reads it is told
        assert error.code() == grpc.StatusCode.CANCELLED
        assert error.details() == "the client took nothing for 1 s"
        await until_held(gateway, 0)


async def test_a_grpc_client_that_never_reads_again_and_goes() -> None:
    """Its call keeps a place until it is gone."""
    async with gateway_at_token(LENGTH - 10) as gateway:
        async with grpc.aio.insecure_channel(gateway.grpc, options=SMALL_WINDOW) as channel:
            call = pb_grpc.TextGenerationStub(channel).Generate(long_request(LENGTH))
            await call.read()
            await until(lambda: len(gateway.scheduler.aborts) == 1, "the abort")
            await until_held(gateway, 1)
        await until_held(gateway, 0)


async def finishes(channel: grpc.aio.Channel, length: int) -> None:
    call, num_tokens = pb_grpc.TextGenerationStub(channel).Generate(long_request(length)), 0
    async for answer in call:
        num_tokens += len(answer.delta.token_ids)
    assert num_tokens == length


async def failure_of(call: grpc.aio.UnaryStreamCall) -> grpc.aio.AioRpcError:  # type: ignore[type-arg]
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("it ended well")


async def until_held(gateway: Gateway, num: int) -> None:
    async with httpx.AsyncClient(base_url=gateway.url) as http, asyncio.timeout(60):
        while f"requests_in_progress {num}.0" not in (await http.get("/metrics")).text:
            pass


async def test_an_http_client_that_stops_reading() -> None:
    body = json.dumps(
        {
            "prompt": "Once",
            "max_tokens": LENGTH,
            "ignore_eos": True,
            "n": 8,
            "stream": True,
            "logprobs": NUM_LOGPROBS,
        }
    )
    async with gateway_at_token(LENGTH - 10) as gateway:
        scheduler = gateway.scheduler
        host, port = gateway.http.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body.encode())
        assert b"200 OK" in await reader.readline()
        async with httpx.AsyncClient(base_url=gateway.url) as http:
            answer = await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 9})
            assert answer.json()["usage"]["completion_tokens"] == 9
            slow = {submit.request for submit in scheduler.submits[:8]}
            await until(lambda: set(scheduler.aborts) == slow, "the aborts")
            await until_held(gateway, 0)
        rest = await all_that_comes(reader)  # the connection was closed
        assert b"[DONE]" not in rest
        writer.close()


async def all_that_comes(reader: asyncio.StreamReader) -> bytes:
    with contextlib.suppress(ConnectionError):
        return await reader.read()
    return b""


async def test_a_body_that_does_not_come() -> None:
    async with gateway_at_token(0) as gateway:
        host, port = gateway.http.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        async with asyncio.timeout(60):
            assert b"499" in await reader.readline()
        writer.close()
