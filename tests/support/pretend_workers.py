"""Workers that speak the real protocol over real gRPC and compute with the simulator's stages.

Their tokens are right only if every page was the right one: see simulation.pretend_model.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

import grpc.aio
from support.pretend_stage import MODEL, PARTS, PretendStage, Shape

from protos import mesh_pb2, mesh_pb2_grpc
from stagemesh import wire
from stagemesh.errors import InternalError, PeerLost, StageMeshError, StaleEpoch
from stagemesh.plan import Span
from stagemesh.rpc import RpcServer, make_channel
from stagemesh.transport import (
    Hello,
    Message,
    PushStream,
    StepFrame,
    open_push_stream,
    push_handlers,
)

__all__ = ["MODEL", "PARTS", "PretendWorker", "Shape", "until"]

WAIT_S = 20.0


async def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for a condition; fails, saying what was waited for."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 - conditions of many kinds
                await asyncio.sleep(0.005)  # between two looks, never instead of one
    except TimeoutError:
        raise AssertionError(f"waited {WAIT_S} s for {what}") from None


class PretendWorker:
    """One process.

    `gate` holds steps back while it is clear, `loads` and `joins` what their names say. `epochs`
    are those that it joined; `refusal` is why the scheduler did not want it; `was_released` that it
    was told to shut down. Pages go from one to another directly.
    """

    by_address: ClassVar[dict[str, PretendWorker]] = {}

    def __init__(
        self, scheduler: str, worker_id: str, incarnation: int = 1, shape: Shape | None = None
    ) -> None:
        self.worker_id = worker_id
        self.gate = asyncio.Event()
        self.gate.set()
        self.epochs: list[mesh_pb2.JoinEpoch] = []
        self.refusal: StageMeshError | None = None
        self.was_released = False
        self.term = shape.followed_term if shape else 0
        self.loads = asyncio.Event()
        self.loads.set()
        self.joins = asyncio.Event()
        self.joins.set()
        self.num_steps = 0
        self.num_loads = 0
        self.fail_next_step: StageMeshError | None = None
        self.fails_on_sequences_of = 0  # tokens of prompt
        self._shape = shape or Shape()
        self._scheduler = scheduler
        self._lease_s = 2.0
        self._incarnation = incarnation
        self._stage: PretendStage | None = None
        self._told: mesh_pb2.JoinEpoch | None = None
        self._join: mesh_pb2.JoinEpoch | None = None
        self._steps: asyncio.Queue[StepFrame] = asyncio.Queue()
        self._joined = asyncio.Condition()
        self._next: PushStream | None = None
        self._outbox: asyncio.Queue[mesh_pb2.WorkerMessage] = asyncio.Queue()
        self._control: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = RpcServer("127.0.0.1:0")
        self._address = ""

    async def start(self) -> PretendWorker:
        self._server.server.add_generic_rpc_handlers((push_handlers(self),))
        self._address = await self._server.start()
        self.by_address[self._address] = self
        self.attach()
        return self

    def attach(self) -> None:
        """Dials the scheduler, with what it holds."""
        self._control = asyncio.create_task(self._follow())

    async def detach(self) -> None:
        """The control stream breaks; the process lives on."""
        assert self._control is not None
        self._control.cancel()
        await asyncio.gather(self._control, return_exceptions=True)
        await self._leave()

    async def kill(self) -> None:
        """The process is gone: no goodbye."""
        self.by_address.pop(self._address, None)
        await self.detach()
        await self._server.stop(0)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def drain(self) -> None:
        """The process is told to stop."""
        draining = mesh_pb2.WorkerDraining(reason="told to stop", remaining_ns=10**10)
        self._outbox.put_nowait(mesh_pb2.WorkerMessage(draining=draining))

    @property
    def num_sequences(self) -> int:
        return self._stage.num_sequences if self._stage else 0

    @property
    def num_tokens(self) -> int:
        """That it computed since it loaded."""
        return self._stage.num_tokens if self._stage else 0

    # ---- the control stream --------------------------------------------------------------------

    async def _follow(self) -> None:
        self._outbox = asyncio.Queue()
        async with make_channel(self._scheduler) as channel:
            call = mesh_pb2_grpc.SchedulerStub(channel).AttachWorker()  # type: ignore[no-untyped-call]
            await call.write(mesh_pb2.WorkerMessage(register=self._registration()))
            async with asyncio.TaskGroup() as group:
                helpers = [group.create_task(self._write(call)), group.create_task(self._beat())]
                with contextlib.suppress(Exception):
                    async for command in call:
                        await self._obey(command)
                for helper in helpers:
                    helper.cancel()

    async def _write(self, call: Any) -> None:
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            while True:
                await call.write(await self._outbox.get())

    async def _beat(self) -> None:
        while True:
            stats = mesh_pb2.WorkerStats(steps_executed=self.num_steps)
            beat = mesh_pb2.WorkerHeartbeat(stats=stats)
            self._outbox.put_nowait(mesh_pb2.WorkerMessage(heartbeat=beat))
            await asyncio.sleep(0.1)

    def _registration(self) -> mesh_pb2.RegisterWorker:
        shape = self._shape
        return mesh_pb2.RegisterWorker(
            protocol_version=wire.PROTOCOL_VERSION,
            worker_id=self.worker_id,
            incarnation=self._incarnation,
            address=self._address,
            model=wire.model_summary_to_proto(shape.model),
            fixed_span=wire.span_to_proto(shape.fixed) if shape.fixed else None,
            loaded=self._stage.loaded if self._stage else None,
            dtype=wire.dtype_to_proto(shape.dtype),
            available_memory_bytes=shape.available_memory_bytes,
            followed_term=self.term,
        )

    async def _obey(self, command: mesh_pb2.WorkerCommand) -> None:
        kind = command.WhichOneof("command")
        if kind == "welcome":
            assert command.welcome.term >= self.term, "a worker follows no lower term"
            self.term = command.welcome.term
            self._lease_s = command.welcome.lease_ms / 1000
        elif kind == "refused":
            self.refusal = wire.error_from_proto(command.refused)
        elif kind == "shutdown":
            self.was_released = True
            await self._leave()
        elif kind == "load_span":
            self._spawn(self._load(wire.span_from_proto(command.load_span.span)))
        elif kind == "join_epoch":
            self._spawn(self._join_epoch(command.join_epoch))
        elif kind == "leave_epoch" and self._is_current(command.leave_epoch.epoch):
            await self._leave()

    async def _load(self, span: Span) -> None:
        self.num_loads += 1
        self._stage = None
        await self.loads.wait()
        self._stage = PretendStage(span, self._shape, self._incarnation)
        self._outbox.put_nowait(mesh_pb2.WorkerMessage(span_loaded=self._stage.loaded))

    # ---- epochs --------------------------------------------------------------------------------

    async def _join_epoch(self, join: mesh_pb2.JoinEpoch) -> None:
        assert self._stage is not None
        await self._leave()
        self._told = join
        await self.joins.wait()
        if self._told is not join:
            return
        epoch = wire.epoch_from_proto(join.epoch)
        self._stage.join(join)
        has_pages = join.HasField("pages") and await self._fetch_pages(join)
        async with self._joined:
            self._join, self._steps = join, asyncio.Queue()
            self._joined.notify_all()
        hello = Hello(join.pipeline_id, epoch, join.stage + 1, self._address)
        try:
            self._next = await open_push_stream(
                join.next_address, hello, timeout_s=WAIT_S, ping_timeout_s=self._lease_s
            )
        except StageMeshError as error:
            self._report_broken(join, error, join.next_address)
            return
        self.epochs.append(join)
        self._spawn(self._execute_steps(join, self._steps, self._next))
        joined = mesh_pb2.EpochJoined(
            pipeline_id=join.pipeline_id, epoch=join.epoch, has_pages=has_pages
        )
        self._outbox.put_nowait(mesh_pb2.WorkerMessage(epoch_joined=joined))

    async def _fetch_pages(self, join: mesh_pb2.JoinEpoch) -> bool:
        source = self.by_address.get(join.pages.address)
        if source is None or source._stage is None or self._stage is None:
            return False
        await source._leave()
        self._stage.fetch(source._stage, join.pages.block_ids)
        return True

    async def _leave(self) -> None:
        self._join = None
        if self._next is not None:
            stream, self._next = self._next, None
            await stream.abandon()

    def _report_broken(
        self, join: mesh_pb2.JoinEpoch, error: StageMeshError, peer_address: str
    ) -> None:
        broken = mesh_pb2.EpochBroken(
            pipeline_id=join.pipeline_id,
            epoch=join.epoch,
            error=wire.error_to_proto(error),
            peer_address=peer_address,
        )
        self._outbox.put_nowait(mesh_pb2.WorkerMessage(epoch_broken=broken))

    def _is_current(self, epoch: Any) -> bool:
        return self._join is not None and self._join.epoch == epoch

    # ---- steps: a PushHandler ------------------------------------------------------------------

    async def accept(self, hello: Hello) -> None:
        epoch = wire.epoch_to_proto(hello.epoch)
        async with asyncio.timeout(WAIT_S), self._joined:
            await self._joined.wait_for(lambda: self._is_current(epoch))

    async def receive(self, hello: Hello, message: Message) -> None:
        assert isinstance(message, StepFrame)
        if not self._is_current(wire.epoch_to_proto(hello.epoch)):
            raise StaleEpoch("the epoch is over")
        self._steps.put_nowait(message)

    async def _execute_steps(
        self, join: mesh_pb2.JoinEpoch, steps: asyncio.Queue[StepFrame], stream: PushStream
    ) -> None:
        """In their order, until the epoch is over or one fails."""
        while True:
            frame = await steps.get()
            await self.gate.wait()
            if self._join is not join or self._stage is None:
                return
            error, self.fail_next_step = self.fail_next_step, None
            if any(0 < row.num_tokens == self.fails_on_sequences_of for row in frame.step.rows):
                error = InternalError("the row cannot be executed")
            if error is not None:
                self._report_broken(join, error, "")
                return
            self.num_steps += 1
            with contextlib.suppress(PeerLost):
                await stream.send(self._stage.execute(frame, join))

    async def broken(self, hello: Hello, error: StageMeshError | None) -> None:
        if self._join is not None and self._is_current(wire.epoch_to_proto(hello.epoch)):
            reason = error or PeerLost("the neighbour ended its stream")
            self._report_broken(self._join, reason, hello.sender_id)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
