"""The gateway's link to the scheduler: holds requests, submits them, routes what comes back.

A request outlives the link: when the stream breaks, everything held is submitted again, with the
tokens so far and a higher attempt, once a scheduler of the same or a higher term is back. Only the
next token of the current attempt is accepted, so a stream has no gap and nothing twice. What the
scheduler does not have, or cannot take yet, waits until its deadline.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import grpc.aio
import structlog

from gateway.backlog import Backlog
from gateway.held_request import Admission, HeldRequest, Submission
from gateway.mesh_session import MeshSession, MeshView, SchedulerLoad, get_load
from gateway.patience import Patience
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
from stagemesh.wire import error_from_proto
from stagemesh.wire_steps import sampled_token_from_proto

_log = structlog.get_logger(__name__)
_MIN_RESUBMIT_S = 0.25
_MAX_RESUBMIT_S = 5.0
_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class MeshClientSettings:
    """`max_unavailable_s`: how long a request waits at most while the mesh does not serve; None:
    until its deadline."""

    scheduler_address: str
    gateway_id: str
    max_unavailable_s: float | None = None
    connect_timeout_s: float = 5.0


class MeshClient:
    """`view` is what the scheduler last said of the mesh; `on_view` is called when it changes.

    Must be made inside a running event loop.
    """

    def __init__(
        self, settings: MeshClientSettings, on_view: Callable[[MeshView], None] | None = None
    ) -> None:
        self.view = MeshView(detail="the scheduler has not been reached yet")
        self._settings = settings
        self._on_view = on_view or (lambda _: None)
        self._incarnation = secrets.randbits(63)
        self._numbers = itertools.count(1)
        self._held: dict[int, HeldRequest] = {}
        self._backlog = Backlog()
        self._patience = Patience(settings.max_unavailable_s, self._give_up)
        self._patience.mesh_is_away(self.view.detail, ())
        self._session: MeshSession | None = None
        self._term = 0
        self._status_channel: grpc.aio.Channel | None = None

    @property
    def num_held(self) -> int:
        return len(self._held)

    @property
    def num_unsubmitted(self) -> int:
        return len(self._backlog)

    # ---- for those who want something generated ----

    def open(self, submission: Submission) -> HeldRequest:
        """Holds the request and submits it as soon as the scheduler is there."""
        held = HeldRequest(next(self._numbers), submission, self)
        held.has_waited = self._session is None
        self._held[held.number] = held
        self._patience.begin(held)
        self._submit_later(held)
        return held

    def release(self, held: HeldRequest) -> None:
        """Forgets the request, and has the mesh forget it; harmless when repeated."""
        if self._held.pop(held.number, None) is not None and not held.ended:
            self._give_up(held, RequestCancelled("the request was cancelled"))

    async def load(self) -> SchedulerLoad | None:
        """The scheduler's own counters; None where it does not answer soon."""
        channel = self._status_channel
        return await get_load(channel) if channel is not None else None

    # ---- the link ----

    async def run(self) -> None:
        """Keeps the link up until cancelled; never ends by itself."""
        backoff = Backoff(0.1, 2.0)
        self._status_channel = make_channel(self._settings.scheduler_address)
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
                _check_cancelled()
                await backoff.wait()
        finally:
            await self._status_channel.close()

    async def _attach(self, backoff: Backoff) -> None:
        """Over a connection of its own: one to a frozen host would stand in the next one's way."""
        settings = self._settings
        async with make_channel(settings.scheduler_address) as channel:
            session = MeshSession(channel, settings.gateway_id, self._incarnation)
            welcome = await session.open(settings.connect_timeout_s)
            try:
                if welcome.term < self._term:
                    raise ProtocolError(
                        f"a scheduler of term {welcome.term}, after one of {self._term}"
                    )
                backoff.reset()
                self._on_attached(session, welcome.term)
                await session.run(self._on_event, self._next_request)
            finally:
                session.close()

    def _on_attached(self, session: MeshSession, term: int) -> None:
        address = self._settings.scheduler_address
        _log.info("attached to the scheduler", address=address, term=term, num_held=self.num_held)
        self._session, self._term = session, term
        session.wake()

    def _on_lost(self, error: StageMeshError) -> None:
        if self._session is not None:
            _log.warning("lost the scheduler", error=str(error), num_held=self.num_held)
            self._session = None
            for held in self._held.values():
                held.submitted, held.has_waited = False, True
                held.unring("again")
                self._submit_later(held)
        self._set_view(MeshView(detail=f"the scheduler is not reachable: {error}"))

    def _set_view(self, view: MeshView) -> None:
        if view.serving:
            self._patience.mesh_serves(self._held.values())
        else:
            self._patience.mesh_is_away(view.detail, self._held.values())
        if view != self.view:
            self.view = view
            self._on_view(view)

    # ---- requests ----

    def _submit_later(self, held: HeldRequest) -> None:
        """The first time, or again: when those before it are submitted."""
        if held.ended:
            return
        self._backlog.add(held)
        if self._session is not None:
            self._session.wake()

    def _next_request(self) -> HeldRequest | None:
        """What the scheduler is told next; it has it from now on."""
        while (held := self._backlog.pop()) is not None:
            held.finish_by_tokens()
            if not held.ended:
                held.attempt += 1
                held.submitted = True
                return held
        return None

    def _give_up(self, held: HeldRequest, error: StageMeshError) -> None:
        """Ends the request here and in the mesh."""
        held.fail(error)
        self._backlog.discard(held)
        if held.submitted and self._session is not None:
            self._session.abort(held)

    def _on_event(self, event: mesh_pb2.GatewayEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "news":
            for tokens in event.news.tokens:
                self._on_tokens(tokens)
            for finished in event.news.finished:
                self._on_finished(finished)
        elif kind == "tokens":
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
        if held is None:
            return
        if message.HasField("cached_prompt_tokens"):
            held.admitted(Admission(message.cached_prompt_tokens, message.queue_ns))
        held.take(
            message.index,
            [sampled_token_from_proto(token) for token in message.tokens],
            [sampled_token_from_proto(token) for token in message.prompt_logprobs],
        )

    def _on_finished(self, message: mesh_pb2.RequestFinished) -> None:
        held = self._current(message.request, message.attempt)
        if held is None:
            return
        held.submitted = False
        if message.reason in (mesh_pb2.END_REASON_STOP_TOKEN, mesh_pb2.END_REASON_LENGTH):
            held.admitted(Admission(message.cached_prompt_tokens, message.queue_ns))
            held.finish(stopped=message.reason == mesh_pb2.END_REASON_STOP_TOKEN)
            return
        error = _end_error(message)
        if isinstance(error, QueueFull) and (held.has_waited or held.attempt > 1):
            self._submit_again(held, error.retry_after_s or 0.0)
        elif isinstance(error, RequestDeadlineExceeded):
            held.fail(self._patience.deadline_error())
        else:
            held.fail(error)

    def _submit_again(self, held: HeldRequest, retry_after_s: float) -> None:
        """It was accepted once: it waits rather than fails. Not all come again at the same time."""
        delay_s = min(max(retry_after_s, _MIN_RESUBMIT_S), _MAX_RESUBMIT_S)
        when_s = asyncio.get_running_loop().time() + delay_s * random.uniform(0.5, 1.0)
        held.ring_at("again", when_s, lambda: self._submit_later(held))


def _end_error(message: mesh_pb2.RequestFinished) -> StageMeshError:
    if message.reason == mesh_pb2.END_REASON_ABORTED:
        return RequestCancelled("the mesh cancelled the request")
    if message.reason != mesh_pb2.END_REASON_ERROR:
        return InternalError(f"the scheduler ended the request for reason {message.reason}")
    error = error_from_proto(message.error)
    if message.HasField("retry_after_ns"):
        error.retry_after_s = message.retry_after_ns / 1e9
    elif isinstance(error, (MeshUnavailable, QueueFull)):
        error.retry_after_s = _RETRY_AFTER_S
    return error


def _check_cancelled() -> None:
    """A stream that breaks at the same moment hides that this task is to end."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


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
