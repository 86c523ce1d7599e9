"""The gateway's link to the scheduler: many requests submitted again, silence, cuts in texts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest
from support.paths import DEMO_MODEL
from support.scripted_scheduler import (
    Gateway,
    ScriptedScheduler,
    Submit,
    scripted_gateway,
    served,
    until,
)

from gateway.held_request import HeldRequest, Submission
from gateway.mesh_client import MeshClient, MeshClientSettings
from gateway.tokenizer import Tokenizer
from protos import text_generation_pb2 as pb
from protos import text_generation_pb2_grpc as pb_grpc
from stagemesh.rpc import RpcServer
from stagemesh.sampling import SamplingSpec

TOKENIZER = Tokenizer.from_directory(DEMO_MODEL)
NUM_HELD = 400


@asynccontextmanager
async def client_of(address: str) -> AsyncIterator[MeshClient]:
    client = MeshClient(MeshClientSettings(address, "test"))
    running = asyncio.create_task(client.run())
    try:
        yield client
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def submission(number: int, num_prompt: int, max_tokens: int = 3) -> Submission:
    prompt = (number + 1,) * num_prompt
    return Submission(f"{number}", "", prompt, SamplingSpec(seed=number), max_tokens)


async def read_all(held: HeldRequest) -> list[int]:
    tokens: list[int] = []
    while True:
        update = await held.read()
        tokens += [token.token_id for token in update.tokens]
        if update.finish is not None:
            return tokens


async def restarted(scheduler: ScriptedScheduler, server: RpcServer) -> None:
    scheduler.break_streams()
    await server.stop(0.1)


async def test_hundreds_are_submitted_again_oldest_first() -> None:
    scheduler = ScriptedScheduler(gate=1)
    async with served(scheduler) as (server, address), client_of(address) as client:
        held = [client.open(submission(n, 500)) for n in range(NUM_HELD)]
        await until(lambda: len(scheduler.submits) == NUM_HELD, "all to be submitted")
        await until(lambda: all(one.output_ids for one in held), "a token each")
        await restarted(scheduler, server)
        await until(lambda: client.num_unsubmitted == NUM_HELD, "the loss to be noticed")
        newer = client.open(submission(NUM_HELD, 10))
        gone = held.pop(7)
        gone.close()
        scheduler.submits.clear()
        async with served(scheduler, address):
            await until(lambda: len(scheduler.submits) == NUM_HELD, "all to be submitted again")
            order = [int(submit.label) for submit in scheduler.submits]
            assert order == [n for n in range(NUM_HELD + 1) if n != 7]
            assert {submit.attempt for submit in scheduler.submits} == {1, 2}
            await scheduler.open_gate(None)
            for one in [*held, newer]:
                tokens = await read_all(one)
                (submit,) = (s for s in scheduler.submits if s.request == one.number)
                assert tokens == scheduler.script(submit)


class Deaf(ScriptedScheduler):
    """Takes no submission until told to."""

    def __init__(self) -> None:
        super().__init__()
        self.listens = asyncio.Event()

    async def _read(self, messages, events, tasks):  # type: ignore[no-untyped-def]
        await self.listens.wait()
        await super()._read(messages, events, tasks)


async def test_what_the_scheduler_does_not_take_stays_held() -> None:
    """A storm of large prompts is not in memory a second time, as messages that wait."""
    scheduler = Deaf()
    num_held, num_prompt = 300, 50_000
    async with served(scheduler) as (_, address), client_of(address) as client:
        held = [client.open(submission(n, num_prompt, max_tokens=1)) for n in range(num_held)]
        await until(lambda: client.num_unsubmitted < num_held, "the first to be written")
        before = -1
        while before != client.num_unsubmitted:  # until the connection is full
            before = client.num_unsubmitted
            await asyncio.sleep(0.2)
        assert client.num_unsubmitted > num_held / 2
        held[-1].close()  # neither written nor aborted
        scheduler.listens.set()
        await asyncio.gather(*map(read_all, held[:-1]))
        assert len(scheduler.submits) == num_held - 1
        assert not scheduler.aborts


async def test_a_scheduler_that_falls_silent_is_left() -> None:
    scheduler = ScriptedScheduler(gate=1, lease_ms=500)
    async with scripted_gateway(DEMO_MODEL, scheduler) as gateway:
        call = asyncio.ensure_future(generate(gateway, "Once"))
        await until(lambda: len(scheduler.submits) == 1, "the request")
        scheduler.beats = False
        await until(lambda: scheduler.num_attached > 1, "another stream")
        scheduler.beats = True
        await until(lambda: len(scheduler.submits) > 1, "the request again")
        await scheduler.open_gate(None)
        assert await call
        # One that speaks is not left, however little it has to say.
        attached, beats = scheduler.num_attached, scheduler.num_heartbeats
        await until(lambda: scheduler.num_heartbeats > beats + 20, "two leases to pass")
        assert scheduler.num_attached == attached


async def generate(gateway: Gateway, prompt: str, **stopping: object) -> tuple[str, list[int]]:
    text, token_ids = "", []
    request = pb.GenerateRequest(
        text=prompt,
        stopping=pb.StoppingCriteria(max_tokens=40, **stopping),  # type: ignore[arg-type]
    )
    async with grpc.aio.insecure_channel(gateway.grpc) as channel:
        async for answer in pb_grpc.TextGenerationStub(channel).Generate(request):
            text += answer.delta.text
            token_ids += answer.delta.token_ids
    return text, token_ids


TEXT = "Once there was a 🦙, and it said naïve things."
TEXT_IDS = list(TOKENIZER.encode(TEXT, add_special_tokens=False))
STOP = "🦙, and it"


def say_text(submit: Submit) -> list[int]:
    return [*TEXT_IDS, *submit.sampling.stop_token_ids[-1:]]


async def until_written(scheduler: ScriptedScheduler, request: int, num: int) -> None:
    await until(lambda: scheduler.num_written[request] >= num, f"{num} tokens")


@pytest.mark.parametrize("stop", [[], [STOP]])
async def test_a_cut_at_every_token_changes_no_text(stop: list[str]) -> None:
    """Also within a character, and within a stop string."""
    scheduler = ScriptedScheduler(script=say_text)
    async with scripted_gateway(DEMO_MODEL, scheduler) as gateway:
        right = await generate(gateway, "x", stop=stop)
        assert right[0] == (TEXT[: TEXT.index(STOP)] if stop else TEXT)
        for cut in range(1, len(right[1])):
            request = cut + 1
            scheduler.submits.clear()
            await scheduler.open_gate(cut)
            call = asyncio.ensure_future(generate(gateway, "x", stop=stop))
            await until_written(scheduler, request, cut)
            scheduler.break_streams()
            await until(lambda: len(scheduler.submits) == 2, "the request again")
            assert list(scheduler.submits[1].output_token_ids) == right[1][:cut]
            await scheduler.open_gate(None)
            assert await call == right
