"""One life of the stream to the scheduler: register, heartbeats, one writer, one reader, one watch.

Knows messages, not what becomes of requests.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import grpc
import grpc.aio

from gateway.held_request import HeldRequest
from protos import mesh_pb2, mesh_pb2_grpc
from stagemesh.errors import MeshUnavailable, ProtocolError
from stagemesh.wire import PROTOCOL_VERSION, error_from_proto, sampling_to_proto

_LOAD_TIMEOUT_S = 2.0
_LOOKS_PER_LEASE = 4


@dataclass(frozen=True, slots=True)
class MeshView:
    """The mesh as the scheduler describes it; see MeshState in mesh.proto."""

    serving: bool = False
    model: str = ""
    identity: str = ""
    max_model_len: int = 0
    num_pipelines: int = 0
    detail: str = ""
    # Identities of the adapters that requests may choose, by name.
    adapters: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_proto(cls, message: mesh_pb2.MeshState) -> MeshView:
        return cls(
            message.serving,
            message.model,
            message.identity,
            message.max_model_len,
            message.num_pipelines,
            message.detail,
            dict(message.adapters),
        )


@dataclass(frozen=True, slots=True)
class SchedulerLoad:
    """Counters of the scheduler, for metrics. Blocks are summed over pipelines."""

    num_waiting: int
    num_running: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_preempted: int


async def get_load(channel: grpc.aio.Channel) -> SchedulerLoad | None:
    """None where the scheduler does not answer soon."""
    stub = mesh_pb2_grpc.SchedulerStub(channel)  # type: ignore[no-untyped-call]
    try:
        status = await stub.GetStatus(mesh_pb2.GetStatusRequest(), timeout=_LOAD_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return None
    return SchedulerLoad(
        num_waiting=status.queue.num_waiting,
        num_running=status.queue.num_running,
        num_blocks=sum(pipeline.num_blocks for pipeline in status.pipelines),
        num_free_blocks=sum(pipeline.num_free_blocks for pipeline in status.pipelines),
        num_cached_blocks=sum(pipeline.num_cached_blocks for pipeline in status.pipelines),
        num_preempted=status.queue.num_preempted,
    )


class MeshSession:
    """From `open` to the stream's end. One task writes; nothing else waits for the scheduler.

    Submissions are fetched one at a time, when the stream takes them, so that a thousand requests
    that are submitted again are not in memory twice. What is queued beside them, aborts and a
    heartbeat, is bounded by what was submitted.
    """

    def __init__(self, channel: grpc.aio.Channel, gateway_id: str, incarnation: int) -> None:
        stub = mesh_pb2_grpc.SchedulerStub(channel)  # type: ignore[no-untyped-call]
        self._call = stub.AttachGateway()
        self._urgent: deque[mesh_pb2.GatewayMessage] = deque()
        self._wake = asyncio.Event()
        self._heartbeat_s = 1.0
        self._lease_s = 0.0
        self._num_silent_looks = 0
        self._register = mesh_pb2.RegisterGateway(
            protocol_version=PROTOCOL_VERSION, gateway_id=gateway_id, incarnation=incarnation
        )

    async def open(self, timeout_s: float) -> mesh_pb2.WelcomeGateway:
        """Registers. Raises a StageMeshError or AioRpcError where that does not work in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._call.write(mesh_pb2.GatewayMessage(register=self._register))
                answer = await self._call.read()
        except TimeoutError as error:
            self.close()
            raise MeshUnavailable(f"the scheduler did not answer within {timeout_s:g} s") from error
        except asyncio.InvalidStateError as error:
            raise MeshUnavailable("the scheduler cannot be reached") from error
        except BaseException:
            self.close()
            raise
        return self._welcomed(answer)

    def _welcomed(self, answer: object) -> mesh_pb2.WelcomeGateway:
        if not isinstance(answer, mesh_pb2.GatewayEvent):
            raise MeshUnavailable("the scheduler ended the stream")
        if answer.WhichOneof("event") == "refused":
            raise error_from_proto(answer.refused)
        if answer.WhichOneof("event") != "welcome":
            raise ProtocolError("the scheduler's first message was no welcome")
        self._heartbeat_s = max(answer.welcome.heartbeat_interval_ms, 10) / 1000
        self._lease_s = answer.welcome.lease_ms / 1000
        return answer.welcome

    async def run(
        self,
        on_event: Callable[[mesh_pb2.GatewayEvent], None],
        next_request: Callable[[], HeldRequest | None],
    ) -> None:
        """Until the stream ends, which is always an error, alone or in a group."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write(next_request))
            tasks.create_task(self._beat())
            tasks.create_task(self._watch())
            while isinstance(event := await self._call.read(), mesh_pb2.GatewayEvent):
                self._num_silent_looks = 0
                on_event(event)
            raise MeshUnavailable("the scheduler ended the stream")

    def close(self) -> None:
        self._call.cancel()

    def wake(self) -> None:
        """There is a request to be fetched."""
        self._wake.set()

    def abort(self, held: HeldRequest) -> None:
        message = mesh_pb2.AbortRequest(request=held.number, attempt=held.attempt)
        self._say(mesh_pb2.GatewayMessage(abort=message))

    def _say(self, message: mesh_pb2.GatewayMessage) -> None:
        self._urgent.append(message)
        self._wake.set()

    async def _write(self, next_request: Callable[[], HeldRequest | None]) -> None:
        try:
            while True:
                self._wake.clear()
                while True:
                    if self._urgent:
                        message = self._urgent.popleft()
                    elif (held := next_request()) is not None:
                        message = submit_to_proto(held)
                    else:
                        break
                    await self._call.write(message)
                await self._wake.wait()
        except asyncio.InvalidStateError as error:  # written to after it ended
            raise MeshUnavailable("the scheduler ended the stream") from error

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            if not self._urgent:  # any message shows that this gateway lives
                self._say(mesh_pb2.GatewayMessage(heartbeat=mesh_pb2.GatewayHeartbeat()))

    async def _watch(self) -> None:
        """A scheduler that is frozen, or whose host is gone, breaks no stream by itself.

        Counts looks, not time: while this process stood still it could not have heard anything.
        """
        while self._lease_s:
            await asyncio.sleep(self._lease_s / _LOOKS_PER_LEASE)
            self._num_silent_looks += 1
            if self._num_silent_looks > _LOOKS_PER_LEASE:
                raise MeshUnavailable(f"the scheduler was silent for {self._lease_s:g} s")


def submit_to_proto(held: HeldRequest) -> mesh_pb2.GatewayMessage:
    submission = held.submission
    message = mesh_pb2.SubmitRequest(
        request=held.number,
        attempt=held.attempt,
        label=submission.label,
        model=submission.model,
        prompt_token_ids=submission.prompt_token_ids,
        output_token_ids=held.output_ids,
        sampling=sampling_to_proto(held.sampling_to_resume()),
        max_tokens=submission.max_tokens,
        priority=submission.priority,
        cache_salt=submission.cache_salt,
        adapter=submission.adapter,
    )
    if submission.deadline_s is not None:
        remaining_s = submission.deadline_s - asyncio.get_running_loop().time()
        message.remaining_ns = max(0, int(remaining_s * 1e9))
    return mesh_pb2.GatewayMessage(submit=message)
