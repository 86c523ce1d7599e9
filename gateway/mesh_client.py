"""The gateway's link to the scheduler: holds requests, submits them, routes what comes back.

A request outlives the link: when the stream breaks, everything held is submitted again, with the
tokens so far and a higher attempt, once a scheduler of the same or a higher term is back. Only the
next token of the current attempt is accepted, so a stream has no gap and nothing twice.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import grpc.aio
import structlog

from gateway.held_request import HeldRequest, MeshFinish, Submission
from gateway.mesh_session import MeshSession, MeshView, SchedulerLoad, get_load
from protos import mesh_pb2
from stagemesh.backoff import Backoff
from stagemesh.errors import (
    InternalError,
    MeshUnavailable,
    ProtocolError,
    QueueFull,
    RequestCancelled,
    RequestDeadlineExceeded,
    StageMeshError,
)
from stagemesh.rpc import error_from_rpc, make_channel
from stagemesh.wire import error_from_proto, sampled_token_from_proto

_log = structlog.get_logger(__name__)
_RESUBMIT_S = 0.25


@dataclass(frozen=True, slots=True)
class MeshClientSettings:
    """`max_unreachable_s`: how long a request waits while no scheduler is reachable at all."""

    scheduler_address: str
    gateway_id: str
    max_unreachable_s: float = 30.0
    connect_timeout_s: float = 5.0


class MeshClient:
    """`view` is what the scheduler last said of the mesh; `on_view` is called when it changes."""

    def __init__(
        self, settings: MeshClientSettings, on_view: Callable[[MeshView], None] | None = None
    ) -> None:
        self.view = MeshView(detail="the scheduler has not been reached yet")
        self._settings = settings
        self._on_view = on_view or (lambda _: None)
        self._incarnation = secrets.randbits(63)
        self._numbers = itertools.count(1)
        self._held: dict[int, HeldRequest] = {}
        self._session: MeshSession | None = None
        self._term = 0
        self._channel: grpc.aio.Channel | None = None

    @property
    def num_held(self) -> int:
        return len(self._held)

    # ---- for those who want something generated ----

    def open(self, submission: Submission) -> HeldRequest:
        """Holds the request and submits it as soon as the scheduler is there."""
        held = HeldRequest(next(self._numbers), submission, self)
        self._held[held.number] = held
        held.at_deadline(lambda: self._expire(held))
        if self._session is not None:
            self._submit(held)
        else:
            self._limit_wait(held)
        return held

    def release(self, held: HeldRequest) -> None:
        """Forgets the request, and has the mesh forget it; harmless when repeated."""
        if self._held.pop(held.number, None) is None:
            return
        if not held.ended:
            held.fail(RequestCancelled("the request was cancelled"))
            self._abort(held)

    async def load(self) -> SchedulerLoad | None:
        """The scheduler's own counters; None where it does not answer soon."""
        return await get_load(self._channel) if self._channel is not None else None

    # ---- the link ----

    async def run(self) -> None:
        """Keeps the link up until cancelled; never ends by itself."""
        backoff = Backoff(0.1, 2.0)
        self._channel = make_channel(self._settings.scheduler_address)
        try:
            while True:
                try:
                    await self._attach(backoff)
                except grpc.aio.AioRpcError as error:
                    self._on_lost(error_from_rpc(error))
                except StageMeshError as error:
                    self._on_lost(error)
                except BaseExceptionGroup as group:
                    self._on_lost(_known_cause(group))
                await backoff.wait()
        finally:
            await self._channel.close()

    async def _attach(self, backoff: Backoff) -> None:
        assert self._channel is not None
        settings = self._settings
        session = MeshSession(self._channel, settings.gateway_id, self._incarnation)
        welcome = await session.open(settings.connect_timeout_s)
        try:
            if welcome.term < self._term:
                raise ProtocolError(
                    f"a scheduler of term {welcome.term}, after one of {self._term}"
                )
            backoff.reset()
            self._on_attached(session, welcome.term)
            await session.run(self._on_event)
        finally:
            session.close()

    def _on_attached(self, session: MeshSession, term: int) -> None:
        _log.info("attached to the scheduler", address=self._settings.scheduler_address, term=term)
        self._session, self._term = session, term
        for held in list(self._held.values()):
            self._submit(held)

    def _on_lost(self, error: StageMeshError) -> None:
        if self._session is not None:
            _log.warning("lost the scheduler", error=str(error), num_held=self.num_held)
            for held in self._held.values():
                self._limit_wait(held)
        self._session = None
        self._set_view(MeshView(detail=f"the scheduler is not reachable: {error}"))

    def _set_view(self, view: MeshView) -> None:
        if view != self.view:
            self.view = view
            self._on_view(view)

    # ---- requests ----

    def _submit(self, held: HeldRequest) -> None:
        """The first time, or again after the link broke."""
        if held.ended or self._session is None:
            return
        if (finish := held.remainder()) is not None:
            held.finish(finish)
            return
        held.stop_waiting()
        held.attempt += 1
        held.submitted = True
        self._session.submit(held)

    def _abort(self, held: HeldRequest) -> None:
        if held.submitted and self._session is not None:
            self._session.abort(held)

    def _expire(self, held: HeldRequest) -> None:
        held.fail(RequestDeadlineExceeded("the deadline passed before the request was finished"))
        self._abort(held)

    def _limit_wait(self, held: HeldRequest) -> None:
        """A request does not wait without end for a scheduler that nobody can reach."""

        def give_up() -> None:
            held.fail(MeshUnavailable(self.view.detail, retry_after_s=1.0))

        held.wait(self._settings.max_unreachable_s, give_up)

    def _on_event(self, event: mesh_pb2.GatewayEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "tokens":
            self._on_tokens(event.tokens)
        elif kind == "finished":
            self._on_finished(event.finished)
        elif kind == "mesh":
            self._set_view(MeshView.from_proto(event.mesh))
        elif kind == "refused":
            raise error_from_proto(event.refused)

    def _current(self, number: int, attempt: int) -> HeldRequest | None:
        """The request that a message is about; None for a stale one."""
        held = self._held.get(number)
        return held if held is not None and held.attempt == attempt and not held.ended else None

    def _on_tokens(self, message: mesh_pb2.RequestTokens) -> None:
        held = self._current(message.request, message.attempt)
        if held is not None:
            held.take(
                message.index,
                [sampled_token_from_proto(token) for token in message.tokens],
                [sampled_token_from_proto(token) for token in message.prompt_logprobs],
            )

    def _on_finished(self, message: mesh_pb2.RequestFinished) -> None:
        held = self._current(message.request, message.attempt)
        if held is None:
            return
        if message.reason in (mesh_pb2.END_REASON_STOP_TOKEN, mesh_pb2.END_REASON_LENGTH):
            stopped = message.reason == mesh_pb2.END_REASON_STOP_TOKEN
            held.finish(MeshFinish(stopped, message.cached_prompt_tokens, message.queue_ns))
            return
        error = _end_error(message)
        if isinstance(error, QueueFull) and held.attempt > 1:
            # It was accepted once: it waits rather than fails.
            held.wait(_RESUBMIT_S, lambda: self._submit(held))
        else:
            held.fail(error)


def _end_error(message: mesh_pb2.RequestFinished) -> StageMeshError:
    if message.reason == mesh_pb2.END_REASON_ABORTED:
        return RequestCancelled("the mesh cancelled the request")
    if message.reason != mesh_pb2.END_REASON_ERROR:
        return InternalError(f"the scheduler ended the request for reason {message.reason}")
    error = error_from_proto(message.error)
    if message.HasField("retry_after_ns"):
        error.retry_after_s = message.retry_after_ns / 1e9
    return error


def _known_cause(group: BaseExceptionGroup[BaseException]) -> StageMeshError:
    """The first error of a group that a peer can cause; raises the group where it has another."""
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    if isinstance(first, grpc.aio.AioRpcError):
        return error_from_rpc(first)
    if isinstance(first, StageMeshError):
        return first
    raise group
