"""A gateway that speaks the real protocol, and a scheduler process to attach it to."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from simulation.oracle import RightAnswer
from simulation.pretend_model import VOCAB_SIZE
from support.pretend_workers import PretendWorker, Shape, until

from protos import mesh_pb2, mesh_pb2_grpc
from scheduler.options import SchedulerOptions
from scheduler.server import serve
from stagemesh.rpc import make_channel
from stagemesh.sampling import SamplingSpec
from stagemesh.wire import PROTOCOL_VERSION, sampling_to_proto


class PretendGateway:
    """One stream. Tokens and endings are by request number."""

    def __init__(self, channel: grpc.aio.Channel, incarnation: int = 1) -> None:
        self._call = mesh_pb2_grpc.SchedulerStub(channel).AttachGateway()  # type: ignore[no-untyped-call]
        self._incarnation = incarnation
        self._reading: asyncio.Task[None] | None = None
        self._beating: asyncio.Task[None] | None = None
        self.mesh: list[mesh_pb2.MeshState] = []
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.finished: dict[int, mesh_pb2.RequestFinished] = {}
        self.prompts: dict[int, tuple[tuple[int, ...], SamplingSpec, int]] = {}
        self.num_heartbeats = 0
        self.refusal: mesh_pb2.GatewayEvent | None = None
        self.status: grpc.StatusCode | None = None
        self._writing = asyncio.Lock()

    async def start(self, *, reads: bool = True, beats: bool = True) -> PretendGateway:
        register = mesh_pb2.RegisterGateway(
            protocol_version=PROTOCOL_VERSION, gateway_id="pretend", incarnation=self._incarnation
        )
        await self._call.write(mesh_pb2.GatewayMessage(register=register))
        assert (await self._call.read()).WhichOneof("event") == "welcome"
        if reads:
            self._reading = asyncio.create_task(self._read())
        if beats:
            self._beating = asyncio.create_task(self._beat())
        return self

    async def submit(
        self, number: int, prompt: tuple[int, ...], max_tokens: int, **fields: Any
    ) -> None:
        spec = fields.pop("spec", SamplingSpec(seed=number))
        self.prompts[number] = (prompt, spec, max_tokens)
        submit = mesh_pb2.SubmitRequest(
            request=number,
            attempt=fields.pop("attempt", 1),
            label=f"request {number}",
            prompt_token_ids=prompt,
            sampling=sampling_to_proto(spec),
            max_tokens=max_tokens,
            **fields,
        )
        await self._send(mesh_pb2.GatewayMessage(submit=submit))

    async def abort(self, number: int) -> None:
        abort = mesh_pb2.AbortRequest(request=number, attempt=1)
        await self._send(mesh_pb2.GatewayMessage(abort=abort))

    async def wait_finished(self, *numbers: int) -> None:
        await until(lambda: all(n in self.finished for n in numbers), f"{numbers} to end")

    def check(self, *numbers: int) -> None:
        """Every one ran to max_tokens with the only right tokens."""
        for number in numbers:
            prompt, spec, max_tokens = self.prompts[number]
            assert self.finished[number].reason == mesh_pb2.END_REASON_LENGTH, self.finished[number]
            right = RightAnswer(prompt, spec, len(prompt) + max_tokens, 0)
            assert tuple(self.tokens[number]) == right.output(max_tokens)

    async def close(self) -> None:
        """The stream breaks."""
        for task in (self._reading, self._beating):
            if task is not None:
                task.cancel()
        self._call.cancel()
        tasks = [task for task in (self._reading, self._beating) if task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, message: mesh_pb2.GatewayMessage) -> None:
        async with self._writing:
            await self._call.write(message)

    async def _read(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            while (event := await self._call.read()) is not grpc.aio.EOF:
                self._take(event)
        self.status = await self._call.code()

    def _take(self, event: mesh_pb2.GatewayEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "mesh":
            self.mesh.append(event.mesh)
        elif kind == "news":
            for tokens in event.news.tokens:
                self._take_tokens(tokens)
            for finished in event.news.finished:
                assert finished.request not in self.finished, "a second ending"
                self.finished[finished.request] = finished
        elif kind == "heartbeat":
            self.num_heartbeats += 1
        elif kind == "refused":
            self.refusal = event

    def _take_tokens(self, message: mesh_pb2.RequestTokens) -> None:
        assert message.request not in self.finished, "a token after the end"
        tokens = self.tokens[message.request]
        assert message.index == len(tokens), "a token is missing or doubled"
        tokens += [token.token_id for token in message.tokens]

    async def _beat(self) -> None:
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            while True:
                beat = mesh_pb2.GatewayHeartbeat()
                await self._send(mesh_pb2.GatewayMessage(heartbeat=beat))
                await asyncio.sleep(0.1)


class PretendMesh:
    """A real scheduler with pretend workers; all of it in this process, over real sockets."""

    def __init__(self, address: str, channel: grpc.aio.Channel) -> None:
        self.address = address
        self.channel = channel
        self.workers: dict[str, PretendWorker] = {}
        self.gateways: list[PretendGateway] = []

    async def worker(
        self, worker_id: str, incarnation: int = 1, shape: Shape | None = None
    ) -> PretendWorker:
        worker = PretendWorker(self.address, worker_id, incarnation, shape)
        self.workers[worker_id] = await worker.start()
        return worker

    async def gateway(self, incarnation: int = 1, **how: bool) -> PretendGateway:
        gateway = await PretendGateway(self.channel, incarnation).start(**how)
        self.gateways.append(gateway)
        return gateway

    async def status(self) -> mesh_pb2.GetStatusResponse:
        stub = mesh_pb2_grpc.SchedulerStub(self.channel)  # type: ignore[no-untyped-call]
        status: mesh_pb2.GetStatusResponse = await stub.GetStatus(mesh_pb2.GetStatusRequest())
        return status

    async def drain(
        self, worker_id: str, to: str = "", *, stay: bool = False
    ) -> mesh_pb2.DrainWorkerResponse:
        stub = mesh_pb2_grpc.SchedulerStub(self.channel)  # type: ignore[no-untyped-call]
        request = mesh_pb2.DrainWorkerRequest(worker_id=worker_id, to_worker_id=to, stay=stay)
        response: mesh_pb2.DrainWorkerResponse = await stub.DrainWorker(request, timeout=20)
        return response

    async def wait_status(self, condition: Any, what: str) -> mesh_pb2.GetStatusResponse:
        status = await self.status()
        async with asyncio.timeout(60):
            while not condition(status):
                await asyncio.sleep(0.01)  # between two looks, never instead of one
                status = await self.status()
        return status

    async def wait_serving(self, num_pipelines: int = 1) -> mesh_pb2.GetStatusResponse:
        return await self.wait_status(
            lambda status: status.mesh.num_pipelines >= num_pipelines, "the mesh to serve"
        )

    async def wait_idle(self) -> mesh_pb2.GetStatusResponse:
        """Nothing runs, waits, or holds a block."""
        return await self.wait_status(
            lambda status: (
                status.queue.num_running == status.queue.num_waiting == 0
                and all(p.num_free_blocks == p.num_blocks for p in status.pipelines)
            ),
            "everything to be free",
        )


@asynccontextmanager
async def pretend_mesh(num_workers: int = 2, **options: Any) -> AsyncIterator[PretendMesh]:
    """Serves when it is entered, where `num_workers` suffice; options are the scheduler's."""
    given = {"num_stages": num_workers, "heartbeat_interval_s": 0.1, "lease_s": 1.0, **options}
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(
        serve(
            SchedulerOptions(listen="127.0.0.1:0", **given),
            lambda facts: ready.set_result(str(facts["address"])),
        )
    )
    async with make_channel(await ready) as channel:
        mesh = PretendMesh(ready.result(), channel)
        try:
            for index in range(num_workers):
                await mesh.worker(f"w{index}")
            if num_workers:
                await mesh.wait_serving()
            yield mesh
        finally:
            for gateway in mesh.gateways:
                await gateway.close()
            for worker in mesh.workers.values():
                await worker.kill()
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving


def prompt_of(number: int, length: int) -> tuple[int, ...]:
    """Some tokens, others for each number."""
    return tuple((7 * number + 3 * position) % VOCAB_SIZE for position in range(length))
