"""What a worker is to the scheduler: registers, obeys commands, reports what came of them.

Turns commands into calls of the span holder and the membership, and their outcomes into messages.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from protos import mesh_pb2
from stage_worker.control import ControlStream
from stage_worker.device_thread import DeviceThread
from stage_worker.load_watch import watch_load
from stage_worker.membership import Membership
from stage_worker.own_address import OwnAddress
from stage_worker.place import PageOrigin, Patience, Place
from stage_worker.rank_processes import RankProcesses
from stage_worker.span_holder import HeldSpan, SpanHolder
from stage_worker.stats import Stats
from stage_worker.watchdog import watch
from stagemesh.errors import CheckpointError, ConfigError, StageMeshError
from stagemesh.plan import Span
from stagemesh.wire import (
    epoch_from_proto,
    epoch_to_proto,
    error_to_proto,
    span_from_proto,
    span_to_proto,
)

log = structlog.get_logger()

LAST_WORDS_S = 0.1

OnHealth = Callable[[bool, bool], None]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a worker is made of; `server` wires it."""

    device: DeviceThread
    holder: SpanHolder
    stats: Stats
    group: asyncio.TaskGroup


class Worker:
    """Implements ControlledWorker and EpochReports; `membership` takes the data streams.

    `on_health(attached, in_epoch)` is called whenever one of them may have changed. The task group
    of `parts` ends with the error of a load that can never succeed.
    """

    def __init__(
        self, scheduler: str, parts: Parts, on_health: OnHealth, patience: Patience
    ) -> None:
        self._identity = mesh_pb2.RegisterWorker()
        self._address: OwnAddress | None = None
        self._scheduler = scheduler
        self._parts = parts
        self._on_health = on_health
        self._attached = False
        self._load_order = asyncio.Lock()
        self._loading: Span | None = None
        self._loads: set[asyncio.Task[None]] = set()
        self.control = ControlStream(scheduler, self)
        self.membership = Membership(parts.group, parts.device, parts.stats, self, patience)

    async def run(self, identity: mesh_pb2.RegisterWorker, address: OwnAddress) -> None:
        """Until the scheduler shuts the worker down. Raises why it was refused.

        `identity` is the registration, but for what is loaded; the `address` in it may change.
        """
        self._identity = identity
        self._address = address
        try:
            await self.control.run()
        finally:
            for task in self._loads:
                task.cancel()

    async def guard_device(self, end_hard: Callable[[], None]) -> None:
        """Ends the process, once the device hangs: no other thread could take its place."""
        error = await watch(self._parts.device)
        log.error("the device hangs: the process ends", reason=str(error))
        await self._end_over(error, end_hard)

    async def guard_ranks(self, ranks: RankProcesses, end_hard: Callable[[], None]) -> None:
        """Ends the process, once one of its ranks has ended: it would wait for it forever."""
        error = await ranks.lost()
        log.error("a rank is lost: the process ends", reason=str(error))
        await self._end_over(error, end_hard)

    async def guard_load(self, limit_s: float, end_hard: Callable[[], None]) -> None:
        """Ends the process, once layers are loaded no further: whoever reads cannot be
        interrupted."""
        error = await watch_load(self._parts.holder.load_progress, limit_s)
        log.error("loading hangs: the process ends", reason=str(error))
        await self._end_over(error, end_hard)

    async def _end_over(self, error: StageMeshError, end_hard: Callable[[], None]) -> None:
        self.membership.fail(error)
        await self.control.flush()
        await asyncio.sleep(LAST_WORDS_S)  # for what was written to leave the process
        end_hard()

    # ---- ControlledWorker

    async def before_dialling(self) -> None:
        assert self._address is not None
        address = await self._address.now()
        if address != self._identity.address:
            log.warning("another address", before=self._identity.address, now=address)
            self._identity.address = address
        self.membership.own_address = address

    def registration(self) -> mesh_pb2.RegisterWorker:
        registration = mesh_pb2.RegisterWorker()
        registration.CopyFrom(self._identity)
        registration.available_memory_bytes = self._parts.holder.available_bytes()
        registration.followed_term = self.membership.term
        if self._parts.holder.held is not None:
            registration.loaded.CopyFrom(_span_loaded(self._parts.holder.held))
        return registration

    def stats(self) -> mesh_pb2.WorkerStats:
        held = self._parts.holder.held
        num_sequences = held.executor.num_sequences if held else 0
        return self._parts.stats.to_proto(
            self._parts.device.num_unfinished,
            num_sequences,
            self._parts.holder.available_bytes(),
            held.executor.experts.routing() if held else {},
        )

    def attached(self, welcome: mesh_pb2.WelcomeWorker) -> None:
        self.membership.follow_term(welcome.term)
        if welcome.lease_ms:
            self.membership.patience = dataclasses.replace(
                self.membership.patience, ping_timeout_s=welcome.lease_ms / 1000
            )
        self._attached = True
        self._tell_health()
        log.info("attached to the scheduler", term=welcome.term)

    def detached(self) -> None:
        """The scheduler takes the worker for lost, so its epoch is over; what it holds it keeps."""
        self._attached = False
        self.membership.leave()
        self._tell_health()

    def command(self, command: mesh_pb2.WorkerCommand) -> None:
        kind = command.WhichOneof("command")
        if kind == "load_span":
            self._start_load(span_from_proto(command.load_span.span))
        elif kind == "join_epoch":
            self.membership.join(self._place(command.join_epoch), self._parts.holder.held)
        elif kind == "leave_epoch":
            leave = command.leave_epoch
            self.membership.leave(leave.pipeline_id, epoch_from_proto(leave.epoch))
            self._tell_health()
        else:
            log.warning("a command of the scheduler is not known here", kind=kind)

    # ---- EpochReports

    def joined(self, place: Place, has_pages: bool) -> None:
        log.info("joined", pipeline=place.pipeline_id, epoch=str(place.epoch), stage=place.stage)
        self._tell_health()
        joined = mesh_pb2.EpochJoined(
            pipeline_id=place.pipeline_id,
            epoch=epoch_to_proto(place.epoch),
            has_pages=has_pages,
        )
        self.control.send(mesh_pb2.WorkerMessage(epoch_joined=joined))

    def broken(self, place: Place, error: StageMeshError, peer_address: str) -> None:
        log.warning(
            "epoch broken",
            pipeline=place.pipeline_id,
            epoch=str(place.epoch),
            reason=str(error),
            peer=peer_address,
        )
        self._tell_health()
        broken = mesh_pb2.EpochBroken(
            pipeline_id=place.pipeline_id,
            epoch=epoch_to_proto(place.epoch),
            error=error_to_proto(error),
            peer_address=peer_address,
        )
        self.control.send(mesh_pb2.WorkerMessage(epoch_broken=broken))

    # ----

    def _start_load(self, span: Span) -> None:
        if self._loading == span:
            return  # told again after the control stream broke: the load goes on
        task = self._parts.group.create_task(self._load(span))
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)

    async def _load(self, span: Span) -> None:
        async with self._load_order:
            self._loading = span
            self.membership.forget_kv()
            try:
                held = await self._parts.holder.load(span, self._progress_reporter(span))
            except StageMeshError as error:
                await self._load_failed(span, error)
            else:
                loaded = _span_loaded(held)
                self.control.send(mesh_pb2.WorkerMessage(span_loaded=loaded))
            finally:
                self._loading = None

    async def _load_failed(self, span: Span, error: StageMeshError) -> None:
        """Tells the scheduler. Raises the error where no other command can help."""
        log.error("layers could not be loaded", span=str(span), reason=str(error))
        self.control.send(mesh_pb2.WorkerMessage(failed=error_to_proto(error)))
        is_fixed = self._identity.HasField("fixed_span")
        if is_fixed or isinstance(error, CheckpointError | ConfigError):
            await self.control.flush()
            raise error

    def _progress_reporter(self, span: Span) -> Callable[[int, int], None]:
        loop = asyncio.get_running_loop()

        def report(loaded_bytes: int, total_bytes: int) -> None:
            progress = mesh_pb2.LoadProgress(
                span=span_to_proto(span), loaded_bytes=loaded_bytes, total_bytes=total_bytes
            )
            message = mesh_pb2.WorkerMessage(load_progress=progress)
            loop.call_soon_threadsafe(self.control.send, message)

        return report

    def _place(self, message: mesh_pb2.JoinEpoch) -> Place:
        return Place(
            pipeline_id=message.pipeline_id,
            epoch=epoch_from_proto(message.epoch),
            stage=message.stage,
            num_stages=message.num_stages,
            # A scheduler that leaves it open is pushed to where it was dialled.
            next_address=message.next_address or self._scheduler,
            num_blocks=message.num_blocks,
            keep_kv=message.keep_kv,
            pages=_origin(message),
            from_end=message.from_end,
            num_log_blocks=message.num_log_blocks if message.HasField("num_log_blocks") else None,
        )

    def _tell_health(self) -> None:
        self._on_health(self._attached, self._attached and self.membership.in_epoch)


def _origin(message: mesh_pb2.JoinEpoch) -> PageOrigin | None:
    if not message.HasField("pages"):
        return None
    return PageOrigin(message.pages.address, tuple(message.pages.block_ids))


def _span_loaded(held: HeldSpan) -> mesh_pb2.SpanLoaded:
    facts = held.facts
    return mesh_pb2.SpanLoaded(
        span=span_to_proto(held.span),
        num_blocks=facts.num_blocks,
        block_size_tokens=facts.block_size_tokens,
        weight_bytes=facts.weight_bytes,
        kv_block_bytes=facts.kv_block_bytes,
        load_ns=facts.load_ns,
        num_log_blocks=facts.num_log_blocks,
    )
