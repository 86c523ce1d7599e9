"""Sessions of workers: their messages to membership, its commands to them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import structlog

from protos import mesh_pb2
from scheduler.convert import (
    command_to_proto,
    loaded_from_proto,
    registration_from_proto,
    stats_from_proto,
)
from scheduler.driver import Driver
from scheduler.messages import Command
from scheduler.outbox import Context, Outbox, converse, first_message
from stagemesh import wire
from stagemesh.errors import ProtocolError, StageMeshError
from stagemesh.rpc import abort_with

_REGISTER_TIMEOUT_S = 10.0
# A join may name some ten thousand blocks.
_MAX_UNREAD_BYTES = 4 * 2**20

log = structlog.get_logger()


class WorkerSessions:
    """All streams of workers. `own_address(peer)` is the scheduler's as that peer reaches it."""

    def __init__(
        self,
        driver: Driver,
        welcome: mesh_pb2.WelcomeWorker,
        own_address: Callable[[str], str],
    ) -> None:
        self._driver = driver
        self._welcome = welcome
        self._own_address = own_address
        self._numbers = count(1)
        self._outboxes: dict[int, Outbox[mesh_pb2.WorkerCommand]] = {}

    # ---- what the driver says ------------------------------------------------------------------

    def tell(self, session: int, command: Command) -> None:
        if outbox := self._outboxes.get(session):
            outbox.put(command_to_proto(command))

    def end(self, session: int, error: StageMeshError | None) -> None:
        if outbox := self._outboxes.get(session):
            if error is not None:
                outbox.put(mesh_pb2.WorkerCommand(refused=wire.error_to_proto(error)))
            outbox.end()

    def end_all(self) -> None:
        for session in list(self._outboxes):
            self.end(session, None)

    # ---- the stream ----------------------------------------------------------------------------

    async def serve(self, context: Context) -> None:
        """One call of AttachWorker, from its first message to its end."""
        first = await first_message(context, _REGISTER_TIMEOUT_S)
        if first is None:
            return
        session = next(self._numbers)
        outbox = self._outboxes[session] = Outbox[mesh_pb2.WorkerCommand](_MAX_UNREAD_BYTES)
        try:
            self._register(session, first, str(context.peer()))
            await converse(context, outbox, lambda message: self._take(session, message))
        except StageMeshError as error:
            log.warning("a worker is refused", code=error.code, reason=str(error))
            await context.write(mesh_pb2.WorkerCommand(refused=wire.error_to_proto(error)))
            await abort_with(context, error)
        finally:
            del self._outboxes[session]
            with self._driver.acting() as now_ns:
                self._driver.membership.disconnected(session, now_ns)

    def _register(self, session: int, message: mesh_pb2.WorkerMessage, peer: str) -> None:
        """The welcome is queued before any command can be."""
        if message.WhichOneof("message") != "register":
            raise ProtocolError("a worker's first message registers it")
        registration = registration_from_proto(message.register, self._own_address(peer))
        with self._driver.acting() as now_ns:
            self._driver.membership.register(session, registration, now_ns)
        self._welcome.term = self._driver.membership.term
        self._outboxes[session].put(mesh_pb2.WorkerCommand(welcome=self._welcome))

    def _take(self, session: int, message: mesh_pb2.WorkerMessage) -> None:
        """Raises ProtocolError for what no worker of this protocol says."""
        kind = message.WhichOneof("message")
        with self._driver.acting() as now_ns:
            members = self._driver.membership
            is_beat = kind == "heartbeat"
            members.heard(
                session, now_ns, stats_from_proto(message.heartbeat.stats) if is_beat else None
            )
            if kind == "load_progress":
                progress = message.load_progress
                members.load_progress(session, progress.loaded_bytes, progress.total_bytes)
            elif kind == "span_loaded":
                members.span_loaded(session, loaded_from_proto(message.span_loaded))
            elif kind == "failed":
                members.failed(session, wire.error_from_proto(message.failed), now_ns)
            elif kind == "goodbye":
                members.goodbye(session, message.goodbye.reason, now_ns)
            elif kind == "draining":
                members.draining(session, now_ns)
            elif kind == "register":
                raise ProtocolError("a worker registers once")
            elif kind in ("epoch_joined", "epoch_broken"):
                self._take_epoch_word(session, message, now_ns)

    def _take_epoch_word(self, session: int, message: mesh_pb2.WorkerMessage, now_ns: int) -> None:
        epochs = self._driver.membership.epochs
        if message.WhichOneof("message") == "epoch_joined":
            joined = message.epoch_joined
            epoch = wire.epoch_from_proto(joined.epoch)
            epochs.joined(session, joined.pipeline_id, epoch, has_pages=joined.has_pages)
            return
        broken = message.epoch_broken
        epochs.broken(
            session,
            broken.pipeline_id,
            wire.epoch_from_proto(broken.epoch),
            wire.error_from_proto(broken.error),
            broken.peer_address,
            now_ns,
        )
