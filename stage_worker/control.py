"""A worker's control stream to the scheduler: dials it, registers, keeps it alive, dials again.

Knows what is first and last on the stream and how it may break; what commands do is the business of
the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

import grpc.aio
import structlog

from protos import mesh_pb2, mesh_pb2_grpc
from stagemesh.backoff import Backoff
from stagemesh.errors import (
    MeshUnavailable,
    PeerLost,
    ProtocolError,
    QueueFull,
    StageMeshError,
    StaleEpoch,
)
from stagemesh.process import root_cause
from stagemesh.rpc import make_channel, read_from
from stagemesh.wire import error_from_proto

WELCOME_TIMEOUT_S = 15.0
FLUSH_TIMEOUT_S = 1.0
MAX_BACKOFF_S = 2.0
MAX_QUEUED_MESSAGES = 1024
MAX_QUEUED_PROGRESS = 16
PASSING = (PeerLost, MeshUnavailable, QueueFull, StaleEpoch)
"""Refusals after which a worker dials again; after any other it ends."""

_Call = grpc.aio.StreamStreamCall[mesh_pb2.WorkerMessage, mesh_pb2.WorkerCommand]

log = structlog.get_logger()


class ControlledWorker(Protocol):
    """What the stream needs of a worker. Nothing here may block."""

    async def before_dialling(self) -> None:
        """The one that may wait."""

    def registration(self) -> mesh_pb2.RegisterWorker: ...
    def stats(self) -> mesh_pb2.WorkerStats: ...

    def attached(self, welcome: mesh_pb2.WelcomeWorker) -> None:
        """A StageMeshError ends the stream; it is dialled again."""

    def command(self, command: mesh_pb2.WorkerCommand) -> None: ...
    def detached(self) -> None: ...


class ControlStream:
    """`run` it once; `send` at any time; `leave` to end in good order."""

    def __init__(self, address: str, worker: ControlledWorker) -> None:
        self._address = address
        self._worker = worker
        self._outbox: asyncio.Queue[mesh_pb2.WorkerMessage] | None = None
        self._call: _Call | None = None
        self._backoff = Backoff(max_s=MAX_BACKOFF_S)
        self._was_up = False
        self._done = False
        self._is_leaving = False
        self._is_over = asyncio.Event()  # while there is no stream
        self._is_over.set()
        self._draining = mesh_pb2.WorkerMessage()
        self._drained_by_s = 0.0
        self._last_reason = ""

    def send(self, message: mesh_pb2.WorkerMessage) -> None:
        """Queues a message. While there is no stream it is dropped: registering tells all anew.

        A scheduler that does not read loses the stream, rather than a word of it.
        """
        if self._outbox is None or self._call is None:
            return
        is_progress = message.WhichOneof("message") == "load_progress"
        if is_progress and self._outbox.qsize() >= MAX_QUEUED_PROGRESS:
            return
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            log.warning("the scheduler does not read", scheduler=self._address)
            self._call.cancel()

    async def run(self) -> None:
        """Until the scheduler shuts the worker down. Raises why it refused the worker for good."""
        while not self._done:
            try:
                await self._worker.before_dialling()
                await self._attach()
            except StageMeshError as error:
                if self._is_leaving:
                    return
                if self._done:
                    raise
                self._log_once(str(error))
            if self._was_up:
                self._was_up = False  # what broke may be whole again: the first dial is at once
            elif not self._done:
                await self._backoff.wait()

    def drain(self, reason: str, patience_s: float) -> bool:
        """Asks to be released: by `ShutdownWorker`, at the latest after this time by `leave`.

        A scheduler that takes the place of this one is asked as well. False where there is none.
        """
        if self._outbox is None:
            return False
        self._drained_by_s = asyncio.get_running_loop().time() + patience_s
        self._draining.draining.reason = reason
        self._ask_again()
        return True

    async def leave(self, reason: str) -> None:
        """Says goodbye, before `run` is cancelled.

        The scheduler ends the stream then, which is waited for, not for long: a word that is on its
        way is lost where the stream is cancelled. Whoever dialled again would come back as a
        member, and a cancellation that meets the end of the stream is lost in a task group.
        """
        self._is_leaving = True
        self.send(mesh_pb2.WorkerMessage(goodbye=mesh_pb2.WorkerGoodbye(reason=reason)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_TIMEOUT_S):
                await self._is_over.wait()

    async def flush(self) -> None:
        """Waits, not for long, until what was queued is written."""
        if self._outbox is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_TIMEOUT_S):
                    await self._outbox.join()

    async def _attach(self) -> None:
        """One stream, from registering to its end."""
        async with make_channel(self._address) as channel:
            stub = mesh_pb2_grpc.SchedulerStub(channel)  # type: ignore[no-untyped-call]
            call: _Call = stub.AttachWorker()
            try:
                welcome = await self._register(call)
                await self._serve(call, welcome)
            finally:
                call.cancel()

    async def _register(self, call: _Call) -> mesh_pb2.WelcomeWorker:
        register = mesh_pb2.WorkerMessage(register=self._worker.registration())
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                await _write(call, register)
                command = await self._read(call)
        except TimeoutError:
            raise PeerLost(f"no welcome within {WELCOME_TIMEOUT_S:g} s") from None
        if command.WhichOneof("command") == "refused":
            raise self._refusal(command)
        if command.WhichOneof("command") != "welcome":
            raise ProtocolError("the scheduler's first word is a welcome")
        return command.welcome

    async def _serve(self, call: _Call, welcome: mesh_pb2.WelcomeWorker) -> None:
        outbox = self._outbox = asyncio.Queue(MAX_QUEUED_MESSAGES)
        self._call = call
        self._is_over.clear()
        try:
            self._worker.attached(welcome)
            self._ask_again()
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(_write_all(call, outbox))
                beating = group.create_task(self._heartbeat(welcome.heartbeat_interval_ms / 1000))
                await self._obey(call)
                writing.cancel()
                beating.cancel()
        except ExceptionGroup as failures:
            raise root_cause(failures) from None
        finally:
            self._outbox = self._call = None
            self._is_over.set()
            self._worker.detached()

    async def _obey(self, call: _Call) -> None:
        """Returns when the worker is told to shut down."""
        while True:
            command = await self._read(call)
            kind = command.WhichOneof("command")
            if kind == "refused":
                raise self._refusal(command)
            if kind == "shutdown":
                log.info("shut down by the scheduler", reason=command.shutdown.reason)
                self._done = True
                return
            self._worker.command(command)

    async def _read(self, call: _Call) -> mesh_pb2.WorkerCommand:
        command = await read_from(call, self._address)
        if command is None:
            raise PeerLost(f"the scheduler at {self._address} ended the stream")
        return command

    def _ask_again(self) -> None:
        if self._draining.HasField("draining"):
            remaining_s = max(0.0, self._drained_by_s - asyncio.get_running_loop().time())
            self._draining.draining.remaining_ns = round(remaining_s * 1e9)
            self.send(self._draining)

    def _refusal(self, command: mesh_pb2.WorkerCommand) -> StageMeshError:
        """What the scheduler has against this worker; dialling again helps where that may pass."""
        error = error_from_proto(command.refused)
        self._done = not isinstance(error, PASSING)
        return error

    def _log_once(self, reason: str) -> None:
        if reason != self._last_reason:
            log.warning("no scheduler", scheduler=self._address, reason=reason)
        self._last_reason = reason

    async def _heartbeat(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(max(0.01, interval_s))
            self._backoff.reset()  # only now: a stream that breaks at once is no success
            self._was_up = True
            self._last_reason = ""
            if self._outbox is not None and self._outbox.empty():
                heartbeat = mesh_pb2.WorkerHeartbeat(stats=self._worker.stats())
                self.send(mesh_pb2.WorkerMessage(heartbeat=heartbeat))


async def _write_all(call: _Call, outbox: asyncio.Queue[mesh_pb2.WorkerMessage]) -> None:
    while True:
        await _write(call, await outbox.get())
        outbox.task_done()


async def _write(call: _Call, message: mesh_pb2.WorkerMessage) -> None:
    """Does not say why a write failed: whoever reads learns that."""
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.write(message)
