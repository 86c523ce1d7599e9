"""A whole mesh on this host: starts its processes, waits until it serves, and leaves none behind.

The gateway and the scheduler are the mesh: if one dies, the rest is stopped and the error says
which. Workers must all come up at first; one that dies later is reported and the mesh goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from protos import mesh_pb2
from stagemesh.addresses import is_wildcard, join_address, split_address
from stagemesh.cli.child import Child
from stagemesh.cli.client import RPC_TIMEOUT_S, get_status
from stagemesh.cli.services import Service, gateway, scheduler, worker
from stagemesh.cli.up_options import UpOptions
from stagemesh.errors import StageMeshError
from stagemesh.rpc import make_channel

POLL_INTERVAL_S = 0.1
# After being told to end, before being made to.
STOP_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """One process of the mesh; layers [start_layer, end_layer) where it is a worker."""

    role: str
    id: str
    pid: int
    address: str
    start_layer: int | None = None
    end_layer: int | None = None


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a serving mesh is reached, as host:port."""

    grpc: str
    http: str
    scheduler: str
    processes: tuple[ProcessFacts, ...]

    def worker_lines(self) -> list[str]:
        """One line per worker, in the order of the layers."""
        workers = [process for process in self.processes if process.role == "worker"]
        workers.sort(key=lambda worker: (worker.start_layer or 0, worker.id))
        return [
            f"  {worker.id:<9}  layers {worker.start_layer}:{worker.end_layer}, pid {worker.pid}"
            for worker in workers
        ]


class MeshView(Protocol):
    """Who is told what happens."""

    def on_line(self, process: str, line: str) -> None: ...
    def on_started(self, process: str, role: str, pid: int) -> None: ...
    def on_ready(self, process: str) -> None: ...
    def on_progress(self, status: mesh_pb2.GetStatusResponse) -> None: ...
    def on_stopping(self) -> None: ...
    def on_lost(self, process: str, error: StageMeshError) -> None: ...


class LocalMesh:
    """One mesh. `run` once; `stop` may be called at any time, twice for at once."""

    def __init__(self, options: UpOptions, view: MeshView) -> None:
        self._options = options
        self._view = view
        self._children: list[Child] = []
        self._pumps = asyncio.TaskGroup()
        self._failed: asyncio.Future[StageMeshError] = asyncio.get_running_loop().create_future()
        self._stop_asked = asyncio.Event()
        self._hurry = asyncio.Event()
        self._serving = False

    def stop(self) -> None:
        if self._stop_asked.is_set():
            self._hurry.set()
        self._stop_asked.set()

    async def run(self, while_serving: Callable[[Endpoints], Awaitable[None]]) -> None:
        """Starts the mesh, runs `while_serving`, and stops when that or anything essential ends.

        Raises why the mesh could not be formed or kept.
        """
        error: Exception | None = None
        async with self._pumps:
            try:
                await self._work(while_serving)
            except Exception as caught:  # raised again below, not wrapped in a group
                error = caught
            finally:
                await self._stop_children()
        if error is not None:
            raise error

    async def _work(self, while_serving: Callable[[Endpoints], Awaitable[None]]) -> None:
        work = asyncio.create_task(self._form_and(while_serving))
        stop_asked = asyncio.create_task(self._stop_asked.wait())
        ends: set[asyncio.Future[Any]] = {work, stop_asked, self._failed}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                raise self._failed.result()
            if work.done():
                await work
        finally:
            stop_asked.cancel()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _form_and(self, while_serving: Callable[[Endpoints], Awaitable[None]]) -> None:
        await while_serving(await self._form())

    async def _form(self) -> Endpoints:
        # The others are told the address that the scheduler bound, never one that it may fail to
        # bind: a scheduler of another mesh could be there.
        first = await self._start(scheduler(self._options))
        scheduler_address = dialled((await self._wait_ready(first))["address"])
        services = [gateway(self._options, scheduler_address)]
        services += [
            worker(self._options, scheduler_address, index)
            for index in range(self._options.num_workers)
        ]
        front, *_ = await asyncio.gather(*map(self._start, services))
        bound = await self._wait_ready(front)
        grpc_address, http_address = dialled(bound["grpc"]), dialled(bound["http"])
        status = await self._wait_serving(scheduler_address, grpc_address)
        self._serving = True
        addresses = {"scheduler": scheduler_address, "gateway": grpc_address}
        return Endpoints(
            grpc=grpc_address,
            http=http_address,
            scheduler=scheduler_address,
            processes=tuple(_facts(child, status, addresses) for child in self._children),
        )

    async def _wait_ready(self, child: Child) -> Mapping[str, Any]:
        facts = await child.wait_ready()
        self._view.on_ready(child.name)
        return facts

    async def _start(self, service: Service) -> Child:
        child = await Child.start(service.role, service.name, service.command, service.environ)
        self._children.append(child)
        self._pumps.create_task(self._watch(child))
        self._view.on_started(child.name, child.role, child.pid)
        return child

    async def _watch(self, child: Child) -> None:
        log_dir = self._options.log_dir
        await child.pump(self._view.on_line, log_dir / f"{child.name}.log" if log_dir else None)
        if self._stop_asked.is_set():
            return
        error = child.failure()
        if self._serving and child.role == "worker":
            self._view.on_lost(child.name, error)
        elif not self._failed.done():
            self._failed.set_result(_named(error, child))

    async def _wait_serving(
        self, scheduler_address: str, grpc_address: str
    ) -> mesh_pb2.GetStatusResponse:
        async with make_channel(scheduler_address) as control, make_channel(grpc_address) as front:
            health = health_pb2_grpc.HealthStub(front)
            while True:
                # Whoever is still starting does not answer; who dies is noticed elsewhere.
                with contextlib.suppress(grpc.aio.AioRpcError):
                    status = await get_status(control)
                    self._view.on_progress(status)
                    if self._is_formed(status) and await _serves(health):
                        return status
                await asyncio.sleep(POLL_INTERVAL_S)

    def _is_formed(self, status: mesh_pb2.GetStatusResponse) -> bool:
        serving = [w for w in status.workers if w.state == mesh_pb2.WORKER_STATE_SERVING]
        return status.mesh.serving and len(serving) >= self._options.num_workers

    async def _stop_children(self) -> None:
        """Each part while those that it needs are still there: gateway, workers, scheduler."""
        self._stop_asked.set()
        self._view.on_stopping()
        drain_s = self._options.drain_timeout_s if self._serving else 0.0
        await self._terminate("gateway", drain_s + STOP_GRACE_S)
        await self._terminate("worker", STOP_GRACE_S)
        await self._terminate("scheduler", STOP_GRACE_S)
        for child in self._children:
            child.kill_group()
        await asyncio.gather(*(child.wait_ended() for child in self._children))

    async def _terminate(self, role: str, grace_s: float) -> None:
        alive = [child for child in self._children if child.role == role and child.alive]
        for child in alive:
            child.signal(signal.SIGTERM)
        if not alive or self._hurry.is_set():
            return
        ended = asyncio.gather(*(child.wait_ended() for child in alive))
        hurry = asyncio.create_task(self._hurry.wait())
        ends: set[asyncio.Future[Any]] = {ended, hurry}
        await asyncio.wait(ends, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        ended.cancel()
        await asyncio.gather(hurry, ended, return_exceptions=True)


async def _serves(health: Any) -> bool:
    request = health_pb2.HealthCheckRequest(service="stagemesh.v1.TextGeneration")
    reply = await health.Check(request, timeout=RPC_TIMEOUT_S)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def dialled(bound: object) -> str:
    """Where this host reaches a server that is bound to `bound`, maybe a wildcard."""
    host, port = split_address(str(bound))
    return join_address("127.0.0.1" if is_wildcard(host) else host, port)


def _facts(
    child: Child, status: mesh_pb2.GetStatusResponse, addresses: Mapping[str, str]
) -> ProcessFacts:
    if child.role != "worker":
        return ProcessFacts(child.role, child.name, child.pid, addresses[child.role])
    (worker,) = (worker for worker in status.workers if worker.pid == child.pid)
    return ProcessFacts(
        child.role,
        worker.worker_id,
        child.pid,
        worker.address,
        start_layer=worker.span.start,
        end_layer=worker.span.end,
    )


def _named(error: StageMeshError, child: Child) -> StageMeshError:
    return type(error)(f"{child.name}: {error}")
