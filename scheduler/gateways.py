"""Sessions of gateways: requests come in, tokens and one ending each go out.

A gateway that is silent for its lease, does not read, or whose stream breaks, is gone, and its
requests with it. It watches the scheduler likewise, which shows that it lives where it has nothing
to say. Knows nothing of pipelines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import structlog

from protos import mesh_pb2
from scheduler.convert import check_protocol, request_from_proto
from scheduler.core import EndReason, Finished, Request, RequestKey, SchedulerCore, Tokens
from scheduler.gateway_news import add_event
from scheduler.mesh_view import MeshView
from scheduler.outbox import Context, Outbox, converse, first_message
from stagemesh import wire
from stagemesh.errors import InvalidRequest, ProtocolError, StageMeshError
from stagemesh.rpc import abort_with

_REGISTER_TIMEOUT_S = 10.0
_MAX_UNREAD_BYTES = 32 * 2**20

log = structlog.get_logger()

Acting = Callable[[], AbstractContextManager[int]]


@dataclass(slots=True, eq=False)
class GatewaySession:
    """One stream of one gateway process. `news` gathers what one turn of the driver gives."""

    gateway_id: str
    incarnation: int
    outbox: Outbox[mesh_pb2.GatewayEvent]
    heard_ns: int
    news: mesh_pb2.RequestNews | None = None
    is_quiet: bool = True

    def say(self, **event: Any) -> None:
        self.flush()
        self.is_quiet = False
        self.outbox.put(mesh_pb2.GatewayEvent(**event))

    def tell(self, event: Tokens | Finished) -> None:
        """In a message with what else comes before the loop's next round."""
        if self.news is None:
            self.news = mesh_pb2.RequestNews()
            asyncio.get_running_loop().call_soon(self.flush)
        add_event(self.news, event)
        if isinstance(event, Tokens) and event.prompt_logprobs:
            self.flush()  # large enough for a message of its own

    def flush(self) -> None:
        if self.news is not None:
            news, self.news, self.is_quiet = self.news, None, False
            self.outbox.put(mesh_pb2.GatewayEvent(news=news))

    async def beat(self, interval_s: float) -> None:
        """Shows that the scheduler lives, where nothing else does."""
        while True:
            await asyncio.sleep(interval_s)
            if self.is_quiet:
                self.say(heartbeat=mesh_pb2.SchedulerHeartbeat())
            self.is_quiet = True


class Gateways:
    """All gateways that are attached. Calls of the core are made inside `acting`."""

    def __init__(
        self,
        core: SchedulerCore,
        acting: Acting,
        welcome: mesh_pb2.WelcomeGateway,
        vocab_size: Callable[[], int],
    ) -> None:
        self._core = core
        self._acting = acting
        self._welcome = welcome
        self._lease_ns = welcome.lease_ms * 1_000_000
        self._heartbeat_s = welcome.heartbeat_interval_ms / 1000
        self._vocab_size = vocab_size
        self._sessions: dict[int, GatewaySession] = {}
        self._view: MeshView | None = None

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[GatewaySession]:
        return iter(list(self._sessions.values()))

    # ---- the stream ----------------------------------------------------------------------------

    async def serve(self, context: Context) -> None:
        """One call of AttachGateway, from its first message to its end."""
        first = await first_message(context, _REGISTER_TIMEOUT_S)
        if first is None:
            return
        outbox: Outbox[mesh_pb2.GatewayEvent] = Outbox(_MAX_UNREAD_BYTES)
        try:
            session = self._register(first, outbox)
        except StageMeshError as error:
            await context.write(mesh_pb2.GatewayEvent(refused=wire.error_to_proto(error)))
            return
        beating = asyncio.create_task(session.beat(self._heartbeat_s))
        try:
            await converse(context, outbox, lambda message: self._take(session, message))
        except StageMeshError as error:
            await abort_with(context, error)
        finally:
            beating.cancel()
            self._lose(session, "its stream ended")

    def _register(
        self, message: mesh_pb2.GatewayMessage, outbox: Outbox[mesh_pb2.GatewayEvent]
    ) -> GatewaySession:
        if message.WhichOneof("message") != "register":
            raise ProtocolError("a gateway's first message registers it")
        register = message.register
        check_protocol(register.protocol_version)
        older = self._sessions.get(register.incarnation)
        if older is not None:
            self._lose(older, "it came back on another stream")
        session = GatewaySession(
            register.gateway_id, register.incarnation, outbox, time.monotonic_ns()
        )
        self._sessions[session.incarnation] = session
        session.say(welcome=self._welcome)
        if self._view is not None:
            session.say(mesh=view_to_proto(self._view))
        log.info("a gateway registered", gateway=session.gateway_id)
        return session

    def _take(self, session: GatewaySession, message: mesh_pb2.GatewayMessage) -> None:
        if self._sessions.get(session.incarnation) is not session:
            return
        kind = message.WhichOneof("message")
        with self._acting() as now_ns:
            session.heard_ns = now_ns
            if kind == "submit":
                self._submit(session, message.submit, now_ns)
            elif kind == "abort":
                key = RequestKey(session.incarnation, message.abort.request)
                self._core.abort(key, now_ns, attempt=message.abort.attempt)
            elif kind == "register":
                raise ProtocolError("a gateway registers once")

    # ---- requests ------------------------------------------------------------------------------

    def _submit(
        self, session: GatewaySession, message: mesh_pb2.SubmitRequest, now_ns: int
    ) -> None:
        """A request that is refused ends with its one event, like any other."""
        try:
            request = request_from_proto(message, session.incarnation, now_ns)
            _check_token_ids(request, self._vocab_size())
            self._core.submit(request, now_ns)
        except StageMeshError as error:
            log.info("a request is refused", request_id=message.label, code=error.code)
            key = RequestKey(session.incarnation, message.request)
            self.deliver(_refusal(key, message.attempt, error))

    def deliver(self, event: Tokens | Finished) -> None:
        """To the gateway whose request it is, if it is still there."""
        session = self._sessions.get(event.key.gateway)
        if session is None:
            return
        session.tell(event)
        if session.outbox.cut_off.done():
            self._lose(session, "it does not read")

    # ---- all of them ---------------------------------------------------------------------------

    def mesh_changed(self, view: MeshView) -> None:
        self._view = view
        for session in self:
            session.say(mesh=view_to_proto(view))

    def end_silent(self, now_ns: int) -> int | None:
        """Ends leases that are over; returns when the next one ends."""
        for session in self:
            if now_ns >= session.heard_ns + self._lease_ns:
                self._lose(session, "it was silent for too long")
        return min((s.heard_ns + self._lease_ns for s in self._sessions.values()), default=None)

    def was_deaf(self, duration_ns: int) -> None:
        """Nobody could be heard for so long: that is no silence of theirs."""
        for session in self:
            session.heard_ns += duration_ns

    def refuse_all(self, error: StageMeshError) -> None:
        """The scheduler ends: everybody is told why."""
        for session in self:
            session.say(refused=wire.error_to_proto(error))
            session.outbox.end()

    def _lose(self, session: GatewaySession, reason: str) -> None:
        session.outbox.cut()
        if self._sessions.get(session.incarnation) is not session:
            return
        del self._sessions[session.incarnation]
        log.info("a gateway is gone", gateway=session.gateway_id, reason=reason)
        with self._acting() as now_ns:
            self._core.abort_gateway(session.incarnation, now_ns)
            # Said now, what was to be said to it reaches nobody: not another stream of its process.
            for event in self._core.take_events():
                self.deliver(event)


def view_to_proto(view: MeshView) -> mesh_pb2.MeshState:
    return mesh_pb2.MeshState(
        serving=view.serving,
        model=view.model,
        identity=view.identity,
        max_model_len=view.max_model_len,
        num_pipelines=view.num_pipelines,
        detail=view.detail,
        adapters=dict(view.adapters),
    )


def _refusal(key: RequestKey, attempt: int, error: StageMeshError) -> Finished:
    return Finished(
        key=key,
        attempt=attempt,
        reason=EndReason.ERROR,
        error=error,
        completion_tokens=0,
        cached_prompt_tokens=0,
        queue_ns=0,
    )


def _check_token_ids(request: Request, vocab_size: int) -> None:
    """A token that no stage knows would end the epoch of everybody. `vocab_size` 0: not known."""
    for name, token_ids in (
        ("prompt", request.prompt_token_ids),
        ("prompt", request.output_token_ids),
        ("logit_bias", request.sampling.logit_bias),
    ):
        highest = max(token_ids, default=0)
        if 0 < vocab_size <= highest:
            raise InvalidRequest(
                f"{name} has token id {highest}, the vocabulary ends at {vocab_size - 1}",
                param=name,
            )
