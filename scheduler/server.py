"""The scheduler as a process: wires core, membership, driver and services together.

Health (grpc.health.v1): "" and "stagemesh.v1.Scheduler" serve while the process does; "mesh" serves
while a pipeline does. The term is the wall clock's time at the start in nanoseconds, which rises
with each incarnation; where the clock was set back, workers tell the term that must be exceeded.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

import structlog

from protos import mesh_pb2, mesh_pb2_grpc
from scheduler.core import Finished, SchedulerCore, Tokens
from scheduler.driver import Driver
from scheduler.gateways import Gateways
from scheduler.links import ResultLinks
from scheduler.membership import Membership
from scheduler.mesh_view import MeshView
from scheduler.messages import Command, DrainDone
from scheduler.metrics import MeshMetrics
from scheduler.metrics_server import serving_metrics
from scheduler.options import SchedulerOptions
from scheduler.outbox import Context
from scheduler.status import status_of
from scheduler.tracing import MAX_WATCHERS
from scheduler.worker_sessions import WorkerSessions
from stagemesh.addresses import advertised_address
from stagemesh.errors import MeshUnavailable, QueueFull, StageMeshError
from stagemesh.rpc import RpcServer, abort_with
from stagemesh.transport import push_handlers

SERVICE_NAME = "stagemesh.v1.Scheduler"
MESH_CHECK = "mesh"
_STOP_GRACE_S = 1.0

log = structlog.get_logger()


async def serve(
    options: SchedulerOptions, on_ready: Callable[[Mapping[str, object]], None] | None
) -> None:
    """Runs until cancelled; tells `on_ready` the address. Raises AddressInUse, ConfigError."""
    server = RpcServer(options.listen)
    core = SchedulerCore(options.core_limits())
    membership = Membership(options.membership_limits(), term=time.time_ns())
    driver = Driver(core, membership, options.driver_timeouts())
    service = SchedulerService(options, driver, server)
    mesh_pb2_grpc.add_SchedulerServicer_to_server(service, server.server)  # type: ignore[no-untyped-call]
    results = push_handlers(ResultLinks(driver), ping_timeout_s=lambda: options.lease_s)
    server.server.add_generic_rpc_handlers((results,))
    server.add_service_name(SERVICE_NAME)
    service.bound = await server.start()
    for name in ("", SERVICE_NAME):
        server.set_serving(True, name)
    server.set_serving(False, MESH_CHECK)
    log.info("the scheduler listens", address=service.bound, term=membership.term)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(server.stop, _STOP_GRACE_S)
        stack.callback(service.say_farewell)
        ready = {"address": service.bound}
        if options.metrics_listen:
            metrics = MeshMetrics(service.status)
            serving = serving_metrics(options.metrics_listen, metrics.expose)
            ready["metrics"] = await stack.enter_async_context(serving)
        if on_ready is not None:
            on_ready(ready)
        await driver.run(service)


class SchedulerService(mesh_pb2_grpc.SchedulerServicer):
    """The gRPC service, and the driver's Peers."""

    def __init__(self, options: SchedulerOptions, driver: Driver, server: RpcServer) -> None:
        self.bound = options.listen
        self._advertise = options.advertise
        self._driver = driver
        self._server = server
        self._start_ns = time.monotonic_ns()
        # Who waits for the end of a drain, by its number.
        self._drains: dict[int, list[asyncio.Future[DrainDone]]] = {}
        pace = {
            "term": driver.membership.term,
            "heartbeat_interval_ms": round(options.heartbeat_interval_s * 1000),
            "lease_ms": round(options.lease_s * 1000),
        }
        self._welcomes = (mesh_pb2.WelcomeWorker(**pace), mesh_pb2.WelcomeGateway(**pace))
        self._workers = WorkerSessions(driver, self._welcomes[0], self._own_address)
        self._gateways = Gateways(driver.core, driver.acting, self._welcomes[1], self._vocab_size)
        self._gateways.mesh_changed(driver.view)

    # ---- rpcs ----------------------------------------------------------------------------------

    async def AttachWorker(self, _: object, context: Context) -> None:  # noqa: N802
        await self._workers.serve(context)

    async def AttachGateway(self, _: object, context: Context) -> None:  # noqa: N802
        self._welcomes[1].term = self._driver.membership.term  # it may have been raised
        await self._gateways.serve(context)

    async def GetStatus(  # noqa: N802
        self, _: mesh_pb2.GetStatusRequest, __: Context
    ) -> mesh_pb2.GetStatusResponse:
        return self.status()

    def status(self) -> mesh_pb2.GetStatusResponse:
        with self._driver.acting() as now_ns:
            return status_of(
                self._driver.membership,
                self._driver.core.stats(now_ns),
                self._driver.view,
                len(self._gateways),
                self._start_ns,
                now_ns,
            )

    async def DrainWorker(  # noqa: N802
        self, request: mesh_pb2.DrainWorkerRequest, context: Context
    ) -> mesh_pb2.DrainWorkerResponse:
        try:
            done = await self._drained(request)
        except StageMeshError as error:
            await abort_with(context, error)
        return mesh_pb2.DrainWorkerResponse(
            successor_id=done.successor_id, num_blocks_moved=done.num_blocks_moved
        )

    async def TraceSteps(  # noqa: N802
        self, request: mesh_pb2.TraceStepsRequest, context: Context
    ) -> None:
        tracer = self._driver.tracer
        if tracer.is_full:
            await abort_with(context, QueueFull(f"{MAX_WATCHERS} traces are being taken already"))
        watcher = tracer.begin(time.monotonic_ns())
        try:
            async for event in watcher.events(request.duration_ns / 1e9):
                await context.write(event)
        finally:
            tracer.end(watcher)

    # ---- peers of the driver -------------------------------------------------------------------

    def tell_worker(self, session: int, command: Command) -> None:
        self._workers.tell(session, command)

    def end_worker(self, session: int, error: StageMeshError | None) -> None:
        self._workers.end(session, error)

    def deliver(self, event: Tokens | Finished) -> None:
        self._gateways.deliver(event)

    def mesh_changed(self, view: MeshView) -> None:
        self._server.set_serving(view.serving, MESH_CHECK)
        self._gateways.mesh_changed(view)

    def drain_done(self, done: DrainDone) -> None:
        for waiting in self._drains.pop(done.drain_id, ()):
            if not waiting.done():
                waiting.set_result(done)

    def end_silent_gateways(self, now_ns: int) -> int | None:
        return self._gateways.end_silent(now_ns)

    def was_deaf(self, duration_ns: int) -> None:
        self._gateways.was_deaf(duration_ns)

    def say_farewell(self) -> None:
        """Gateways and workers will dial again: a scheduler may come back here."""
        self._gateways.refuse_all(
            MeshUnavailable("the scheduler is shutting down", retry_after_s=1.0)
        )
        self._workers.end_all()

    # ---- inside --------------------------------------------------------------------------------

    async def _drained(self, request: mesh_pb2.DrainWorkerRequest) -> DrainDone:
        """It goes on though whoever asked for it has gone. Raises what speaks against it."""
        with self._driver.acting() as now_ns:
            drain_id = self._driver.membership.drain(
                request.worker_id, request.to_worker_id, stay=request.stay, now_ns=now_ns
            )
        waiting: asyncio.Future[DrainDone] = asyncio.get_running_loop().create_future()
        self._drains.setdefault(drain_id, []).append(waiting)
        done = await waiting
        if done.error is not None:
            raise done.error
        return done

    def _own_address(self, peer: str) -> str:
        """As the worker at `peer` ("ipv4:1.2.3.4:5", "ipv6:[::1]:5") reaches it, for results."""
        _, _, towards = peer.partition(":")
        return advertised_address(self.bound, self._advertise, unquote(towards))

    def _vocab_size(self) -> int:
        summary: Any = self._driver.membership.model.summary
        return summary.vocab_size if summary else 0
