"""A mesh of real processes that are addressed one by one, and what its scheduler says of it.

Nothing is started again by itself: whoever breaks a part decides when it comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import grpc.aio

from benchmarks.recovery.part import POLL_S, Launch, Part, execute
from protos import mesh_pb2, mesh_pb2_grpc

Status = mesh_pb2.GetStatusResponse

_SETTLED = (
    mesh_pb2.WORKER_STATE_IDLE,
    mesh_pb2.WORKER_STATE_READY,
    mesh_pb2.WORKER_STATE_SERVING,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshShape:
    """What to start. Workers beyond `stages * replicas` are spares."""

    model: Path
    stages: int = 3
    replicas: int = 1
    spares: int = 0
    gateways: int = 1
    scheduler_options: tuple[str, ...] = ()
    worker_options: tuple[str, ...] = ("--num-blocks", "400")
    gateway_options: tuple[str, ...] = ()
    batch_invariant: bool = True
    # Whether it counts as whole with other stages than these, after some took layers over.
    may_be_recut: bool = False

    @property
    def num_workers(self) -> int:
        return self.stages * self.replicas + self.spares


class PartsMesh:
    """The parts of one mesh. Nobody watches them: what dies stays dead until it is started, workers
    by `launch_worker`.

    Parts that need more than their shape says are added before `start`. `gateway_at` and
    `scheduler_at` are where this process reaches them, if not where they say they are.
    """

    def __init__(self, shape: MeshShape, scratch: Path, launch_worker: Launch = execute) -> None:
        self.shape = shape
        self.scratch = scratch
        self.launch_worker = launch_worker
        self.scheduler = _scheduler(shape, scratch)
        self.gateways: list[Part] = []
        self.workers: dict[str, Part] = {}
        self.gateway_at = ""
        self.scheduler_at = ""

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            self.end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.end()

    @property
    def parts(self) -> list[Part]:
        return [*self.gateways, *self.workers.values(), self.scheduler]

    @property
    def target(self) -> str:
        """Where the first gateway serves gRPC."""
        return self.gateway_at or self.gateways[0].facts["grpc"]

    async def start(self) -> None:
        """Starts what does not run; returns when all pipelines serve and the spares are there."""
        await self.start_dead()
        await self.until_whole()

    async def start_dead(self) -> None:
        """Starts what does not run; returns when it can be reached."""
        if not self.scheduler.alive:
            self.scheduler.start()
            await self.scheduler.wait_ready()
        self._add_missing(self.scheduler.facts["address"])
        dead = [part for part in self.parts if not part.alive]
        for part in dead:
            part.start()
        for part in self.parts:
            await part.wait_ready()

    def add_worker(self, name: str, scheduler_address: str, *options: str) -> Part:
        """A worker that is not started yet; options after these prevail."""
        worker = _worker(self.shape, name, scheduler_address, self.scratch, options)
        worker.launch = self.launch_worker
        self.workers[name] = worker
        return worker

    def add_gateway(self, name: str, scheduler_address: str, *options: str) -> Part:
        self.gateways.append(_gateway(self.shape, name, scheduler_address, self.scratch, options))
        return self.gateways[-1]

    def _add_missing(self, scheduler_address: str) -> None:
        for n in range(len(self.workers), self.shape.num_workers):
            self.add_worker(f"worker-{n}", scheduler_address)
        for n in range(len(self.gateways), self.shape.gateways):
            self.add_gateway(f"gateway-{n}", scheduler_address)

    async def status(self) -> Status:
        return await status_of(self.scheduler_at or self.scheduler.facts["address"])

    async def until(
        self, condition: Callable[[Status], bool], what: str, timeout_s: float = 60.0
    ) -> Status:
        """The first status that fulfils `condition`; a scheduler that is away says nothing."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                status = await self.status()
                if condition(status):
                    return status
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
            await asyncio.sleep(POLL_S)

    async def until_whole(self, timeout_s: float = 60.0) -> Status:
        """Until every living part is a member, and as many pipelines serve as there are to be."""
        return await self.until(self._is_whole, "the mesh to be whole", timeout_s)

    async def until_idle(self, timeout_s: float = 30.0) -> Status:
        """Until no request is held and every block is free."""
        return await self.until(is_idle, "the mesh to be idle", timeout_s)

    async def restore(self) -> None:
        """Starts or thaws what is not at work, and waits until the mesh is as in the beginning."""
        for part in self.parts:
            if part.alive:
                part.thaw()
        await self.start_dead()
        await self.until_whole()
        await self.until_idle()

    def at(self, status: Status, stage: int, pipeline: int = 0) -> Part:
        """The worker that holds a stage."""
        return self.workers[status.pipelines[pipeline].worker_ids[stage]]

    def spares(self, status: Status) -> list[Part]:
        used = {name for pipeline in status.pipelines for name in pipeline.worker_ids}
        return [part for name, part in self.workers.items() if name not in used]

    def describe(self) -> str:
        return "\n".join(part.last_words() for part in self.parts)

    def end(self) -> None:
        for part in self.parts:
            if part.alive:
                part.thaw()
            part.kill()

    def _is_whole(self, status: Status) -> bool:
        members = {worker.worker_id: worker for worker in status.workers}
        alive = {name: part for name, part in self.workers.items() if part.alive}
        return (
            sum(map(self._is_as_wanted, status.pipelines)) == self.shape.replicas
            and status.num_gateways == sum(part.alive for part in self.gateways)
            and members.keys() == alive.keys()
            and all(members[name].pid == part.pid for name, part in alive.items())
            and all(member.state in _SETTLED for member in members.values())
        )

    def _is_as_wanted(self, pipeline: mesh_pb2.PipelineStatus) -> bool:
        num_stages = len(pipeline.worker_ids)
        return pipeline.serving and (num_stages == self.shape.stages or self.shape.may_be_recut)


def is_idle(status: Status) -> bool:
    return (
        status.queue.num_running == 0
        and status.queue.num_waiting == 0
        and all(p.num_free_blocks == p.num_blocks for p in status.pipelines)
    )


async def status_of(address: str) -> Status:
    """Over a connection of its own: one that failed would wait before it is dialled again."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = mesh_pb2_grpc.SchedulerStub(channel)
        response: Status = await stub.GetStatus(mesh_pb2.GetStatusRequest(), timeout=5.0)
        return response


def _scheduler(shape: MeshShape, scratch: Path) -> Part:
    shape_options = ("--stages", str(shape.stages), "--replicas", str(shape.replicas))
    return Part(
        "scheduler",
        "scheduler",
        (*shape_options, "--listen", "127.0.0.1:0", *shape.scheduler_options),
        scratch,
        lambda facts: ("--listen", facts["address"]),
    )


def _gateway(
    shape: MeshShape, name: str, scheduler_address: str, scratch: Path, more: tuple[str, ...]
) -> Part:
    free_ports = ("--host", "127.0.0.1", "--grpc-port", "0", "--http-port", "0")
    options = ("--scheduler", scheduler_address, "--model", str(shape.model))
    return Part(
        "gateway",
        name,
        (*options, "--gateway-id", name, *free_ports, *shape.gateway_options, *more),
        scratch,
        lambda facts: (
            *("--grpc-port", facts["grpc"].rpartition(":")[2]),
            *("--http-port", facts["http"].rpartition(":")[2]),
        ),
    )


def _worker(
    shape: MeshShape, name: str, scheduler_address: str, scratch: Path, more: tuple[str, ...]
) -> Part:
    own = ("--scheduler", scheduler_address, "--model", str(shape.model), "--worker-id", name)
    invariant = "--batch-invariant" if shape.batch_invariant else "--no-batch-invariant"
    return Part(
        "worker",
        name,
        (*own, invariant, "--listen", "127.0.0.1:0", *shape.worker_options, *more),
        scratch,
        lambda facts: ("--listen", facts["address"]),
    )
