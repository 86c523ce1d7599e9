"""A whole mesh on this host: starts its processes, waits until it serves, and leaves none behind.

All must come up at first. Later a worker that dies is reported and the mesh goes on; without
gateway or scheduler it ends, and the error says which. With `--restart` whatever dies is started
again, at the same address.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from protos import mesh_pb2
from stagemesh.cli.child import Child
from stagemesh.cli.client import RPC_TIMEOUT_S, get_status
from stagemesh.cli.held_ports import HeldPorts
from stagemesh.cli.keeper import Keeper, KeeperView
from stagemesh.cli.mesh_facts import Endpoints, ProcessFacts, dialled
from stagemesh.cli.services import Service, gateway, scheduler, worker
from stagemesh.cli.up_options import UpOptions
from stagemesh.cli.worker_template import WorkerTemplate
from stagemesh.errors import StageMeshError
from stagemesh.rpc import make_channel

POLL_INTERVAL_S = 0.1
# After being told to end, before being made to.
STOP_GRACE_S = 5.0


class MeshView(KeeperView, Protocol):
    """Who is told what happens."""

    def on_progress(self, status: mesh_pb2.GetStatusResponse) -> None: ...
    def on_stopping(self) -> None: ...
    def on_lost(self, process: str, error: StageMeshError) -> None: ...
    def on_left(self, process: str) -> None: ...


class LocalMesh:
    """One mesh. `run` once; `stop` may be called at any time, twice for at once."""

    def __init__(self, options: UpOptions, view: MeshView) -> None:
        self._options = options
        self._view = view
        self._ports = HeldPorts()
        self._template = WorkerTemplate()
        self._keepers: list[Keeper] = []
        self._keeping = asyncio.TaskGroup()
        self._failed: asyncio.Future[StageMeshError] = asyncio.get_running_loop().create_future()
        self._stop_asked = asyncio.Event()
        self._hurry = asyncio.Event()
        self._serving = False

    def stop(self) -> None:
        if self._stop_asked.is_set():
            self._hurry.set()
        self._stop_asked.set()

    def with_pids(self, endpoints: Endpoints) -> Endpoints:
        """The same mesh with the processes of now."""
        pids = {keeper.service.name: keeper.child.pid for keeper in self._keepers}
        processes = (dataclasses.replace(p, pid=pids[p.id]) for p in endpoints.processes)
        return dataclasses.replace(endpoints, processes=tuple(processes))

    async def run(self, while_serving: Callable[[Endpoints], Awaitable[None]]) -> None:
        """Starts the mesh, runs `while_serving`, and stops when that or anything essential ends.

        Raises why the mesh could not be formed or kept.
        """
        error: Exception | None = None
        with contextlib.closing(self._ports):
            async with self._keeping:
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

    # ---- forming -------------------------------------------------------------------------------

    async def _form(self) -> Endpoints:
        # The others are told the address that the scheduler bound, never one that it may fail to
        # bind: a scheduler of another mesh could be there.
        options = self._options
        if options.restart:
            options = self._ports.hold_fronts(options)
        if options.restart or options.num_workers > 1:
            of_workers = worker(options, "", 0, 0).environ
            await self._template.begin(of_workers, self._view.on_line)
        first = await self._start(scheduler(options))
        scheduler_address = dialled((await first.child.wait_ready())["address"])
        services = [gateway(options, scheduler_address)]
        services += [
            worker(options, scheduler_address, index, self._worker_port())
            for index in range(options.num_workers)
        ]
        front, *_ = await asyncio.gather(*map(self._start, services))
        bound = await front.child.wait_ready()
        grpc_address, http_address = dialled(bound["grpc"]), dialled(bound["http"])
        status = await self._wait_serving(scheduler_address, grpc_address)
        self._serving = True
        processes = (
            ProcessFacts("scheduler", "scheduler", first.child.pid, scheduler_address),
            ProcessFacts("gateway", "gateway", front.child.pid, grpc_address),
            *map(ProcessFacts.of_worker, status.workers),
        )
        return Endpoints(grpc_address, http_address, scheduler_address, processes)

    def _worker_port(self) -> int:
        return self._ports.hold("127.0.0.1") if self._options.restart else 0

    async def _start(self, service: Service) -> Keeper:
        keeper = Keeper(service, self._view, self._options.log_dir, self._template.start)
        await keeper.start()
        self._keepers.append(keeper)
        self._keeping.create_task(keeper.run(self._was_last_life, self._stop_asked))
        return keeper

    def _was_last_life(self, child: Child) -> bool:
        if self._stop_asked.is_set():
            return True
        if self._serving and self._options.restart:
            return False
        if self._serving and child.role == "worker":
            if child.ended_well:
                self._view.on_left(child.name)
            else:
                self._view.on_lost(child.name, child.failure())
        elif not self._failed.done():
            self._failed.set_result(_named(child.failure(), child))
        return True

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
        """All pipelines serve; of the spares it is enough that they are there."""
        serving = [w for w in status.workers if w.state == mesh_pb2.WORKER_STATE_SERVING]
        return (
            status.mesh.serving
            and len(serving) >= self._options.num_stage_workers
            and len(status.workers) >= self._options.num_workers
        )

    # ---- stopping ------------------------------------------------------------------------------

    async def _stop_children(self) -> None:
        """Each part while those that it needs are still there: gateway, workers, scheduler."""
        self._stop_asked.set()
        self._view.on_stopping()
        drain_s = self._options.drain_timeout_s if self._serving else 0.0
        await self._end("gateway", signal.SIGTERM, drain_s + STOP_GRACE_S)
        # SIGTERM would have them look for somebody who goes on with their work.
        await self._end("worker", signal.SIGINT, STOP_GRACE_S)
        await self._end("scheduler", signal.SIGTERM, STOP_GRACE_S)
        for keeper in self._keepers:
            keeper.child.kill_group()
        await asyncio.gather(*(keeper.child.wait_ended() for keeper in self._keepers))
        await self._template.end()

    async def _end(self, role: str, number: signal.Signals, grace_s: float) -> None:
        children = [keeper.child for keeper in self._keepers if keeper.service.role == role]
        alive = [child for child in children if child.alive]
        for child in alive:
            child.signal(number)
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


def _named(error: StageMeshError, child: Child) -> StageMeshError:
    return type(error)(f"{child.name}: {error}")
