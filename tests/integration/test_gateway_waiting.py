"""How long requests wait for a mesh that does not serve, and what they end with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import httpx
import openai
import pytest
from support.paths import DEMO_MODEL
from support.scripted_scheduler import (
    Finished,
    Gateway,
    ScriptedScheduler,
    running_gateway,
    scripted_gateway,
    served,
    until,
)

from gateway.grpc_messages import margin_s
from protos import mesh_pb2, plan_pb2
from protos import text_generation_pb2 as pb
from protos import text_generation_pb2_grpc as pb_grpc

Code = grpc.StatusCode
BODY = {"prompt": "Once", "max_tokens": 4}


def ask() -> pb.GenerateRequest:
    return pb.GenerateRequest(text="Once", stopping=pb.StoppingCriteria(max_tokens=4))


async def generate(gateway: Gateway, timeout_s: float | None = None) -> list[int]:
    """The tokens of one call; raises AioRpcError."""
    async with grpc.aio.insecure_channel(gateway.grpc) as channel:
        call = pb_grpc.TextGenerationStub(channel).Generate(ask(), timeout=timeout_s)
        return [token_id async for answer in call for token_id in answer.delta.token_ids]


async def failure(gateway: Gateway, timeout_s: float | None = None) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(gateway, timeout_s)
    return caught.value


def retry_after_ms(error: grpc.aio.AioRpcError) -> int:
    return int(dict(tuple(item) for item in error.trailing_metadata())["retry-after-ms"])


@asynccontextmanager
async def without_scheduler(**options: Any) -> AsyncIterator[Gateway]:
    """A gateway that dials an address where nobody listens."""
    scheduler = ScriptedScheduler()
    async with served(scheduler) as (server, address):
        await server.stop(0)
        async with running_gateway(DEMO_MODEL, address, scheduler, **options) as gateway:
            yield gateway


@asynccontextmanager
async def without_pipeline(**options: Any) -> AsyncIterator[Gateway]:
    """A gateway whose scheduler says that no pipeline serves."""
    scheduler = ScriptedScheduler(gate=0, serving=False)
    async with scripted_gateway(DEMO_MODEL, scheduler, **options) as gateway:
        yield gateway


AWAY = [without_scheduler, without_pipeline]


@pytest.mark.parametrize("away", AWAY)
@pytest.mark.parametrize("timeout_s", [0.3, 3.0])
async def test_the_client_hears_why_before_its_own_clock_rings(away: Any, timeout_s: float) -> None:
    async with away() as gateway:
        began = time.monotonic()
        error = await failure(gateway, timeout_s)
        assert time.monotonic() - began > timeout_s / 2
    assert error.code() == Code.UNAVAILABLE
    assert "no pipeline served" in str(error.details())
    assert 1000 <= retry_after_ms(error) <= 30_000


@pytest.mark.parametrize(
    ("timeout_s", "margin"),
    [(0.05, 0.005), (2, 0.2), (20, 0.35), (99.9, 0.35), (101, 1.25), (600, 1.25), (3600, 10.25)],
)
def test_the_margin_is_more_than_grpc_rounds_up(timeout_s: float, margin: float) -> None:
    assert margin_s(timeout_s) == pytest.approx(margin)


@pytest.mark.parametrize("timeout_s", [0.7, 9.371, 70.03, 100.4])
async def test_grpc_rounds_no_more_than_that(timeout_s: float) -> None:
    async with scripted_gateway(DEMO_MODEL) as gateway:
        await generate(gateway, timeout_s)
        told_s = gateway.scheduler.submits[0].remaining_ns / 1e9
    assert told_s - timeout_s < margin_s(told_s)


@pytest.mark.parametrize("away", AWAY)
async def test_the_default_deadline(away: Any) -> None:
    async with away(default_timeout_s=0.3) as gateway:
        error = await failure(gateway)
        assert error.code() == Code.UNAVAILABLE
        assert retry_after_ms(error) >= 1000
        async with httpx.AsyncClient(base_url=gateway.url) as http:
            for stream in (False, True):
                answer = await http.post("/v1/completions", json={**BODY, "stream": stream})
                assert answer.status_code == 503
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "mesh_unavailable"


async def test_a_mesh_that_serves_and_is_too_slow() -> None:
    async with scripted_gateway(
        DEMO_MODEL, ScriptedScheduler(gate=0), default_timeout_s=0.3
    ) as gateway:
        assert (await failure(gateway)).code() == Code.DEADLINE_EXCEEDED
        async with httpx.AsyncClient(base_url=gateway.url) as http:
            assert (await http.post("/v1/completions", json=BODY)).status_code == 504


@pytest.mark.parametrize(("default_s", "told"), [(600.0, True), (0.0, False)])
async def test_the_default_deadline_reaches_the_mesh(default_s: float, told: bool) -> None:
    async with scripted_gateway(DEMO_MODEL, default_timeout_s=default_s) as gateway:
        await generate(gateway)
        await generate(gateway, 50.0)
        async with httpx.AsyncClient(base_url=gateway.url) as http:
            await http.post("/v1/completions", json=BODY)
        over_grpc, with_own, over_http = gateway.scheduler.submits
    assert over_grpc.HasField("remaining_ns") == over_http.HasField("remaining_ns") == told
    assert 0 < with_own.remaining_ns < 51e9
    if told:
        assert 590e9 < over_http.remaining_ns <= 600e9


@pytest.mark.parametrize("away", AWAY)
async def test_max_unavailable_ends_the_wait_sooner(away: Any) -> None:
    async with away(max_unavailable_s=0.2) as gateway:
        error = await failure(gateway, 60.0)
        assert error.code() == Code.UNAVAILABLE
        assert "away for 0.2 s" in str(error.details())
        assert retry_after_ms(error) >= 1000


async def test_max_unavailable_counts_only_while_nothing_serves() -> None:
    scheduler = ScriptedScheduler(gate=1)
    async with scripted_gateway(DEMO_MODEL, scheduler, max_unavailable_s=0.5) as gateway:
        calls = [asyncio.ensure_future(generate(gateway)) for _ in range(2)]
        await until(lambda: len(scheduler.submits) == 2, "the requests")
        for _ in range(3):
            await scheduler.set_serving(False)
            await until_health(gateway, 503)
            await scheduler.set_serving(True)
            await until_health(gateway, 200)
        await scheduler.open_gate(2)
        await scheduler.set_serving(False)
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError, match=r"away for 0\.5 s"):
                await call
        await until(lambda: len(scheduler.aborts) == 2, "the aborts")


async def until_health(gateway: Gateway, status: int) -> None:
    async with httpx.AsyncClient(base_url=gateway.url) as http, asyncio.timeout(60):
        while (await http.get("/health")).status_code != status:
            pass


async def test_the_mesh_s_own_deadline_says_the_same() -> None:
    """The scheduler's clock may ring first: what is told depends on the mesh, not on who tells."""
    error = plan_pb2.Error(code="deadline_exceeded", message="the deadline has passed")
    scheduler = ScriptedScheduler(
        serving=False, refuse=lambda _: Finished(reason=mesh_pb2.END_REASON_ERROR, error=error)
    )
    async with scripted_gateway(DEMO_MODEL, scheduler) as gateway:
        assert (await failure(gateway)).code() == Code.UNAVAILABLE
        await scheduler.set_serving(True)
        await until_health(gateway, 200)
        assert (await failure(gateway)).code() == Code.DEADLINE_EXCEEDED


@pytest.mark.parametrize("away", AWAY)
async def test_as_many_wait_as_the_gateway_holds(away: Any) -> None:
    async with away(max_concurrent_requests=2, default_timeout_s=0.0) as gateway:
        waiting = [asyncio.ensure_future(generate(gateway)) for _ in range(2)]
        async with httpx.AsyncClient(base_url=gateway.url) as http:
            async with asyncio.timeout(60):
                while "requests_in_progress 2.0" not in (await http.get("/metrics")).text:
                    pass
            error = await failure(gateway)
            assert error.code() == Code.RESOURCE_EXHAUSTED
            assert retry_after_ms(error) > 0
            answer = await http.post("/v1/completions", json=BODY)
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
        for call in waiting:
            assert not call.done()
            call.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_what_waited_for_the_scheduler_is_not_refused_by_its_queue() -> None:
    """And what comes while it is there is refused at once."""
    error = plan_pb2.Error(code="queue_full", message="full")
    full = Finished(reason=mesh_pb2.END_REASON_ERROR, error=error, retry_after_ns=10**8)
    scheduler = ScriptedScheduler(refuse=lambda _: full)
    async with served(scheduler) as (server, address):
        await server.stop(0)
        async with running_gateway(DEMO_MODEL, address, scheduler) as gateway:
            waiting = asyncio.ensure_future(generate(gateway))
            async with httpx.AsyncClient(base_url=gateway.url) as http, asyncio.timeout(60):
                while "requests_in_progress 1.0" not in (await http.get("/metrics")).text:
                    pass
            async with served(scheduler, address):
                await until(lambda: len(scheduler.submits) >= 3, "attempts")
                assert (await failure(gateway)).code() == Code.RESOURCE_EXHAUSTED
                scheduler.refuse = lambda _: None
                assert len(await waiting) == 4


async def test_tokens_that_were_streamed_stay_valid() -> None:
    scheduler = ScriptedScheduler(gate=2)
    async with (
        scripted_gateway(DEMO_MODEL, scheduler, default_timeout_s=1.0) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = await client.completions.create(
            model="demo", prompt="x", stream=True, max_tokens=4, extra_body={"ignore_eos": True}
        )
        assert (await anext(stream)).choices[0].text
        await scheduler.set_serving(False)
        with pytest.raises(openai.APIError, match="no pipeline served") as caught:
            [_ async for _ in stream]
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["retry_after_s"] >= 1
