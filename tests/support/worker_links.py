"""A scheduler that does what a test says, by real gRPC towards real workers."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
from support.template import fork_worker

from benchmarks.recovery.part import Launch, Process
from protos import mesh_pb2, mesh_pb2_grpc
from stage_worker.options import WorkerOptions
from stage_worker.server import serve
from stagemesh.errors import StageMeshError
from stagemesh.plan import Epoch, Span, StepResult
from stagemesh.process import root_cause
from stagemesh.rpc import RpcServer
from stagemesh.transport import Hello, Message, PushStream, open_push_stream, push_handlers
from stagemesh.wire import epoch_to_proto, error_to_proto, span_to_proto

TIMEOUT_S = 60.0


@dataclass
class WorkerLink:
    """One worker's control stream, seen from the scheduler."""

    registration: mesh_pb2.RegisterWorker
    messages: asyncio.Queue[mesh_pb2.WorkerMessage] = field(default_factory=asyncio.Queue)
    commands: asyncio.Queue[mesh_pb2.WorkerCommand] = field(default_factory=asyncio.Queue)
    heartbeats: asyncio.Queue[mesh_pb2.WorkerStats] = field(default_factory=asyncio.Queue)
    progress: list[mesh_pb2.LoadProgress] = field(default_factory=list)
    left: set[int] = field(default_factory=set)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    hanging_up: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def address(self) -> str:
        return self.registration.address

    def command(self, **command: Any) -> None:
        self.commands.put_nowait(mesh_pb2.WorkerCommand(**command))

    def hang_up(self) -> None:
        """Ends the stream, without a word."""
        self.hanging_up.set()

    def take(self, message: mesh_pb2.WorkerMessage) -> None:
        kind = message.WhichOneof("message")
        if kind == "heartbeat":
            self.heartbeats.put_nowait(message.heartbeat.stats)
        elif kind == "epoch_broken" and message.epoch_broken.epoch.n in self.left:
            pass  # a neighbour left earlier and closed its stream
        elif kind == "load_progress":
            self.progress.append(message.load_progress)
        else:
            self.messages.put_nowait(message)

    async def expect(self, kind: str) -> Any:
        """The next message, which must be of `kind`."""
        async with asyncio.timeout(TIMEOUT_S):
            message = await self.messages.get()
        assert message.WhichOneof("message") == kind, message
        return getattr(message, kind)

    async def next_stats(self) -> mesh_pb2.WorkerStats:
        """Statistics that the worker made after this was called."""
        async with asyncio.timeout(TIMEOUT_S):
            while not self.heartbeats.empty():
                self.heartbeats.get_nowait()
            await self.heartbeats.get()  # may have been under way already
            return await self.heartbeats.get()

    async def load(self, start: int, end: int) -> mesh_pb2.SpanLoaded:
        self.start_load(start, end)
        loaded: mesh_pb2.SpanLoaded = await self.expect("span_loaded")
        assert (loaded.span.start, loaded.span.end) == (start, end)
        return loaded

    def start_load(self, start: int, end: int) -> None:
        self.command(load_span=mesh_pb2.LoadSpan(span=span_to_proto(Span(start, end))))

    def join(
        self,
        epoch: Epoch,
        stage: int,
        num_stages: int,
        next_address: str,
        *,
        num_blocks: int = 32,
        keep_kv: bool = False,
        pages_from: str = "",
        block_ids: Sequence[int] = (),
        pipeline_id: str = "p",
        from_end: bool = False,
        num_log_blocks: int | None = None,
    ) -> None:
        source = mesh_pb2.PageSource(address=pages_from, block_ids=block_ids)
        join = mesh_pb2.JoinEpoch(
            pipeline_id=pipeline_id,
            epoch=epoch_to_proto(epoch),
            stage=stage,
            num_stages=num_stages,
            next_address=next_address,
            num_blocks=num_blocks,
            keep_kv=keep_kv,
            pages=source if pages_from else None,
            from_end=from_end,
            num_log_blocks=num_log_blocks,
        )
        self.command(join_epoch=join)

    def leave(self, epoch: Epoch, pipeline_id: str = "p") -> None:
        self.left.add(epoch.n)
        leave = mesh_pb2.LeaveEpoch(pipeline_id=pipeline_id, epoch=epoch_to_proto(epoch))
        self.command(leave_epoch=leave)


class LinkScheduler(mesh_pb2_grpc.SchedulerServicer):
    """Welcomes every worker; the rest is up to the test. Also takes the last stage's results."""

    def __init__(self, term: int, lease_ms: int) -> None:
        self.term = term
        self.lease_ms = lease_ms
        self.address = ""
        self.refusal: StageMeshError | None = None
        self.links: asyncio.Queue[WorkerLink] = asyncio.Queue()
        self.results: asyncio.Queue[StepResult] = asyncio.Queue()

    async def AttachWorker(  # noqa: N802
        self, _: object, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        first = await context.read()
        link = WorkerLink(first.register)
        await context.write(self._first_word())
        self.links.put_nowait(link)
        sending = asyncio.create_task(self._send(link, context))
        taking = asyncio.create_task(self._take(link, context))
        hanging_up = asyncio.create_task(link.hanging_up.wait())
        try:
            await asyncio.wait([taking, hanging_up], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, taking, hanging_up):
                task.cancel()
            link.ended.set()

    async def _take(self, link: WorkerLink, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        while isinstance(message := await context.read(), mesh_pb2.WorkerMessage):
            link.take(message)
            if message.WhichOneof("message") == "goodbye":
                return

    def _first_word(self) -> mesh_pb2.WorkerCommand:
        if self.refusal is not None:
            return mesh_pb2.WorkerCommand(refused=error_to_proto(self.refusal))
        welcome = mesh_pb2.WelcomeWorker(
            term=self.term, heartbeat_interval_ms=50, lease_ms=self.lease_ms
        )
        return mesh_pb2.WorkerCommand(welcome=welcome)

    async def _send(self, link: WorkerLink, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        while True:
            await context.write(await link.commands.get())

    async def worker(self) -> WorkerLink:
        """The next worker to register."""
        async with asyncio.timeout(TIMEOUT_S):
            return await self.links.get()

    async def result(self) -> StepResult:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.results.get()

    async def form(self, links: list[WorkerLink], epoch: Epoch, *, keep_kv: bool = False) -> None:
        """All `links`, in order, join `epoch`; returns when they all have."""
        addresses = [link.address for link in links[1:]] + [self.address]
        for stage, (link, address) in enumerate(zip(links, addresses, strict=True)):
            link.join(epoch, stage, len(links), address, keep_kv=keep_kv)
        for link in links:
            joined = await link.expect("epoch_joined")
            assert joined.epoch == epoch_to_proto(epoch)

    # ---- PushHandler: results

    async def accept(self, hello: Hello) -> None:
        pass

    async def receive(self, hello: Hello, message: Message) -> None:
        assert isinstance(message, StepResult)
        self.results.put_nowait(message)

    async def broken(self, hello: Hello, error: StageMeshError | None) -> None:
        pass


@asynccontextmanager
async def link_scheduler(
    address: str = "127.0.0.1:0", term: int = 1, lease_ms: int = 5000
) -> AsyncIterator[LinkScheduler]:
    scheduler = LinkScheduler(term, lease_ms)
    server = RpcServer(address)
    mesh_pb2_grpc.add_SchedulerServicer_to_server(scheduler, server.server)  # type: ignore[no-untyped-call]
    server.server.add_generic_rpc_handlers((push_handlers(scheduler),))
    scheduler.address = await server.start()
    try:
        yield scheduler
    finally:
        await server.stop(0)


async def push_to(link: WorkerLink, epoch: Epoch, pipeline_id: str = "p") -> PushStream:
    """The scheduler's stream to stage 0."""
    hello = Hello(pipeline_id, epoch, 0, "scheduler")
    return await open_push_stream(link.address, hello, timeout_s=20)


@dataclass
class WorkerProcess:
    """A worker in a process of its own."""

    process: Process
    log: Path

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def wait(self) -> int:
        """Its exit code."""
        async with asyncio.timeout(TIMEOUT_S):
            return await asyncio.to_thread(self.process.wait)

    def output(self) -> str:
        return self.log.read_text()


@asynccontextmanager
async def worker_process(
    model: Path,
    scheduler_address: str,
    *flags: str,
    program: Sequence[str] = ("-m", "stage_worker"),
    launch: Launch = fork_worker,
) -> AsyncIterator[WorkerProcess]:
    """Kills the process at the end where it still runs, and prints what it logged."""
    command = [
        *(sys.executable, *program, "--model", str(model)),
        *("--scheduler", scheduler_address, "--listen", "127.0.0.1:0"),
        *("--num-blocks", "32", *flags),
    ]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    link, workers_link = socket.socketpair()
    with link, tempfile.NamedTemporaryFile(suffix=".log") as sink:
        with workers_link:
            process = launch(command, environ, workers_link.fileno(), sink.fileno())
        worker = WorkerProcess(process, Path(sink.name))
        try:
            yield worker
        finally:
            process.kill()
            process.wait()
            sys.stdout.write(worker.output()[-4000:])


def execute_alone(
    command: Sequence[str], environ: Mapping[str, str], _link: int, output: int
) -> Process:
    """As somebody does at a terminal: there is no supervisor to report to."""
    return subprocess.Popen(command, stdout=output, stderr=output, env=dict(environ))


@asynccontextmanager
async def local_worker(
    model: Path, scheduler_address: str, **options: Any
) -> AsyncIterator[asyncio.Task[None]]:
    """A worker in this process: what a process costs is spared, all else is real."""
    chosen = {"listen": "127.0.0.1:0", "num_blocks": 32, **options}
    task = asyncio.create_task(
        serve(WorkerOptions(model=model, scheduler=scheduler_address, **chosen))
    )
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def failure(worker: asyncio.Task[None]) -> BaseException:
    """What ended a local worker."""
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.wait([worker])
    error = worker.exception()
    assert error is not None
    return root_cause(error)
