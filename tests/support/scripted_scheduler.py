"""A scheduler for tests of the gateway: real gRPC, tokens by script instead of by a model."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from gateway.options import GatewayOptions
from gateway.server import serve
from protos import mesh_pb2, mesh_pb2_grpc, plan_pb2
from stagemesh.rpc import RpcServer

WAIT_S = 15.0
Submit = mesh_pb2.SubmitRequest
Finished = mesh_pb2.RequestFinished
Script = Callable[[Submit], list[int]]


async def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for a condition; fails, saying what was waited for."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 - conditions of many kinds
                await asyncio.sleep(0.005)  # between two looks, never instead of one
    except TimeoutError:
        raise AssertionError(f"waited {WAIT_S} s for {what}") from None


def count_up(submit: Submit) -> list[int]:
    """Tokens that tell requests and positions apart: any number of them, none special."""
    first = 300 + submit.prompt_token_ids[-1] % 50
    return [first + n % 100 for n in range(submit.max_tokens)]


@dataclass
class ScriptedScheduler(mesh_pb2_grpc.SchedulerServicer):
    """Answers every request with `script`, one token a message, as far as `gate` lets it.

    `gate` 0 holds every token back; None lets all pass. `refuse` ends requests with an error.
    """

    script: Script = count_up
    gate: int | None = None
    refuse: Callable[[Submit], Finished | None] = lambda _: None
    serving: bool = True
    max_model_len: int = 512
    term: int = 1
    submits: list[Submit] = field(default_factory=list)
    aborts: list[int] = field(default_factory=list)
    num_attached: int = 0
    num_finished: int = 0
    num_heartbeats: int = 0
    # Messages with tokens, by request.
    num_written: Counter[int] = field(default_factory=Counter)
    repeats: int = 0  # how often each token is sent again
    beats: bool = True
    # Longer than a busy machine leaves any process alone.
    lease_ms: int = 20_000
    _streams: list[asyncio.Queue[mesh_pb2.GatewayEvent | None]] = field(default_factory=list)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _running: dict[int, asyncio.Task[None]] = field(default_factory=dict)

    async def AttachGateway(  # noqa: N802
        self,
        messages: AsyncIterator[mesh_pb2.GatewayMessage],
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> None:
        register = (await anext(aiter(messages))).register
        assert register.incarnation
        self.num_attached += 1
        events: asyncio.Queue[mesh_pb2.GatewayEvent | None] = asyncio.Queue()
        self._streams.append(events)
        welcome = mesh_pb2.WelcomeGateway(
            term=self.term, heartbeat_interval_ms=50, lease_ms=self.lease_ms
        )
        await context.write(mesh_pb2.GatewayEvent(welcome=welcome))
        await context.write(mesh_pb2.GatewayEvent(mesh=self._state()))
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(self._read(messages, events, tasks))
            beating = tasks.create_task(self._beat(events))
            while (event := await events.get()) is not None:
                await context.write(event)
                self.num_written[event.tokens.request] += 1
                self.num_finished += event.WhichOneof("event") == "finished"
            reading.cancel()
            beating.cancel()
            for task in list(self._running.values()):
                task.cancel()
        self._streams.remove(events)

    async def _beat(self, events: asyncio.Queue[mesh_pb2.GatewayEvent | None]) -> None:
        while True:
            await asyncio.sleep(0.05)
            if self.beats:
                beat = mesh_pb2.SchedulerHeartbeat()
                events.put_nowait(mesh_pb2.GatewayEvent(heartbeat=beat))

    def _state(self) -> mesh_pb2.MeshState:
        return mesh_pb2.MeshState(
            serving=self.serving,
            identity="cafe",
            max_model_len=self.max_model_len if self.serving else 0,
            detail="" if self.serving else "no worker yet",
        )

    async def _read(
        self,
        messages: AsyncIterator[mesh_pb2.GatewayMessage],
        events: asyncio.Queue[mesh_pb2.GatewayEvent | None],
        tasks: asyncio.TaskGroup,
    ) -> None:
        async for message in messages:
            kind = message.WhichOneof("message")
            if kind == "submit":
                self.submits.append(message.submit)
                task = tasks.create_task(self._run(message.submit, events))
                self._running[message.submit.request] = task
            elif kind == "abort":
                self.aborts.append(message.abort.request)
                self._running[message.abort.request].cancel()
            elif kind == "heartbeat":
                self.num_heartbeats += 1
        events.put_nowait(None)

    async def _run(
        self, submit: Submit, events: asyncio.Queue[mesh_pb2.GatewayEvent | None]
    ) -> None:
        refusal = self.refuse(submit)
        if refusal is not None:
            refusal.request, refusal.attempt = submit.request, submit.attempt
            events.put_nowait(mesh_pb2.GatewayEvent(finished=refusal))
            return
        tokens = self.script(submit)[: submit.max_tokens]
        stops, reason = set(submit.sampling.stop_token_ids), mesh_pb2.END_REASON_LENGTH
        num_sent = 0
        for index in range(len(submit.output_token_ids), len(tokens)):
            await self._pass(index)
            for _ in range(1 + self.repeats):
                events.put_nowait(self._tokens(submit, index, tokens[index]))
            num_sent += 1
            if tokens[index] in stops:
                reason = mesh_pb2.END_REASON_STOP_TOKEN
                break
        finished = Finished(
            request=submit.request,
            attempt=submit.attempt,
            reason=reason,
            completion_tokens=len(submit.output_token_ids) + num_sent,
            cached_prompt_tokens=2,
            queue_ns=1000,
        )
        events.put_nowait(mesh_pb2.GatewayEvent(finished=finished))

    async def _pass(self, index: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.gate is None or index < self.gate)

    def _tokens(self, submit: Submit, index: int, token_id: int) -> mesh_pb2.GatewayEvent:
        sampling, num_prompt = submit.sampling, len(submit.prompt_token_ids)
        known = list(submit.prompt_token_ids)
        prompt_logprobs: list[plan_pb2.SampledToken] = []
        if index == 0 and sampling.HasField("num_prompt_logprobs"):
            number = sampling.num_prompt_logprobs
            prompt_logprobs = [_sampled(p, known[p], number) for p in range(1, num_prompt)]
        wanted = sampling.num_logprobs if sampling.HasField("num_logprobs") else None
        return mesh_pb2.GatewayEvent(
            tokens=mesh_pb2.RequestTokens(
                request=submit.request,
                attempt=submit.attempt,
                index=index,
                tokens=[_sampled(num_prompt + index, token_id, wanted)],
                prompt_logprobs=prompt_logprobs,
            )
        )

    # ---- what a test does to it ----

    async def open_gate(self, gate: int | None) -> None:
        async with self._changed:
            self.gate = gate
            self._changed.notify_all()

    async def set_serving(self, serving: bool) -> None:
        self.serving = serving
        for events in self._streams:
            events.put_nowait(mesh_pb2.GatewayEvent(mesh=self._state()))

    def break_streams(self) -> None:
        for events in self._streams:
            events.put_nowait(None)

    async def GetStatus(  # noqa: N802
        self,
        request: mesh_pb2.GetStatusRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> mesh_pb2.GetStatusResponse:
        return mesh_pb2.GetStatusResponse(
            queue=mesh_pb2.QueueStatus(num_waiting=3),
            pipelines=[mesh_pb2.PipelineStatus(num_blocks=10, num_free_blocks=7)],
        )


def _sampled(position: int, token_id: int, num_logprobs: int | None) -> plan_pb2.SampledToken:
    token = plan_pb2.SampledToken(position=position, token_id=token_id)
    if num_logprobs is not None:
        token.logprob = -0.5
        token.alternative_ids.extend([token_id, *range(400, 400 + num_logprobs)][:num_logprobs])
        token.alternative_logprobs.extend([-0.5 - n for n in range(num_logprobs)])
    return token


@dataclass
class Gateway:
    grpc: str
    http: str
    scheduler: ScriptedScheduler

    @property
    def url(self) -> str:
        return f"http://{self.http}"


@asynccontextmanager
async def served(
    scheduler: ScriptedScheduler, address: str = "127.0.0.1:0"
) -> AsyncIterator[tuple[RpcServer, str]]:
    server = RpcServer(address)
    mesh_pb2_grpc.add_SchedulerServicer_to_server(scheduler, server.server)
    bound = await server.start()
    try:
        yield server, bound
    finally:
        scheduler.break_streams()
        await server.stop(0.1)


@asynccontextmanager
async def running_gateway(
    model: Path, scheduler_address: str, scheduler: ScriptedScheduler, **options: object
) -> AsyncIterator[Gateway]:
    """The whole gateway in this process, on free ports; cancelled at the end, as by SIGTERM."""
    ready: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()
    settings = GatewayOptions(
        model=model,
        scheduler=scheduler_address,
        host="127.0.0.1",
        grpc_port=0,
        http_port=0,
        **{"drain_timeout_s": 0.1, **options},  # type: ignore[arg-type]
    )
    task = asyncio.ensure_future(serve(settings, lambda facts: ready.set_result(dict(facts))))  # type: ignore[arg-type]
    await asyncio.wait({ready, task}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    facts = ready.result()
    try:
        yield Gateway(facts["grpc"], facts["http"], scheduler)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def scripted_gateway(
    model: Path, scheduler: ScriptedScheduler | None = None, **options: object
) -> AsyncIterator[Gateway]:
    """A gateway attached to a scripted scheduler."""
    scripted = scheduler or ScriptedScheduler()
    async with (
        served(scripted) as (_, address),
        running_gateway(model, address, scripted, **options) as gateway,
    ):
        await until(lambda: scripted.num_attached > 0, "the gateway to attach")
        yield gateway
