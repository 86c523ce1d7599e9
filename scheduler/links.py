"""The data streams between the scheduler and the stages: steps out to the first, results in from
the last.

One stream each way per epoch. What breaks is told to the driver; when to open and close is
membership's to say.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import structlog

from stagemesh.errors import PeerLost, ProtocolError, StageMeshError, StaleEpoch
from stagemesh.plan import Epoch, Step, StepResult
from stagemesh.transport import Hello, Message, PushStream, StepFrame, open_push_stream

SENDER_ID = "scheduler"

log = structlog.get_logger()

_Key = tuple[str, Epoch]


class LinkOwner(Protocol):
    """Whom the links tell. Nothing here waits."""

    def num_stages(self, pipeline_id: str, epoch: Epoch) -> int | None:
        """None where that epoch is not (or no longer) the pipeline's."""

    def stream_opened(self, pipeline_id: str, epoch: Epoch) -> None: ...
    def stream_broken(self, pipeline_id: str, epoch: Epoch, error: StageMeshError) -> None: ...

    def result_came(self, result: StepResult) -> None:
        """Raises ProtocolError for what was not asked for."""


class StepLinks:
    """Streams to first stages. `group` runs them. A stage that is silent for `ping_timeout_s` is
    lost."""

    def __init__(
        self,
        group: asyncio.TaskGroup,
        owner: LinkOwner,
        open_timeout_s: float,
        ping_timeout_s: float,
    ) -> None:
        self._group = group
        self._owner = owner
        self._open_timeout_s = open_timeout_s
        self._ping_timeout_s = ping_timeout_s
        self._tasks: dict[_Key, asyncio.Task[None]] = {}
        self._streams: dict[_Key, PushStream] = {}

    def open(self, pipeline_id: str, epoch: Epoch, address: str) -> None:
        task = self._group.create_task(self._hold(pipeline_id, epoch, address))
        self._tasks[pipeline_id, epoch] = task

    def close(self, pipeline_id: str, epoch: Epoch) -> None:
        self._streams.pop((pipeline_id, epoch), None)
        if task := self._tasks.pop((pipeline_id, epoch), None):
            task.cancel()

    def close_all(self) -> None:
        for key in list(self._tasks):
            self.close(*key)

    async def send(self, step: Step) -> None:
        """Steps of an epoch without a stream are dropped: they will be planned again."""
        stream = self._streams.get((step.pipeline_id, step.epoch))
        if stream is None:
            return
        try:
            if stream.is_full:
                raise PeerLost(f"{stream.address} does not take the steps it is sent")
            await stream.send(StepFrame(step))
        except StageMeshError as error:
            self._owner.stream_broken(step.pipeline_id, step.epoch, error)

    async def _hold(self, pipeline_id: str, epoch: Epoch, address: str) -> None:
        hello = Hello(pipeline_id, epoch, 0, SENDER_ID)
        try:
            stream = await open_push_stream(
                address,
                hello,
                timeout_s=self._open_timeout_s,
                ping_timeout_s=self._ping_timeout_s,
            )
        except StageMeshError as error:
            self._owner.stream_broken(pipeline_id, epoch, error)
            return
        try:
            self._streams[pipeline_id, epoch] = stream
            self._owner.stream_opened(pipeline_id, epoch)
            self._owner.stream_broken(pipeline_id, epoch, await stream.wait_broken())
        finally:
            await stream.abandon()


class ResultLinks:
    """Streams from last stages: a stagemesh.transport.PushHandler."""

    def __init__(self, owner: LinkOwner) -> None:
        self._owner = owner
        self._accepted: dict[str, Epoch] = {}

    async def accept(self, hello: Hello) -> None:
        num_stages = self._owner.num_stages(hello.pipeline_id, hello.epoch)
        if num_stages is None:
            raise StaleEpoch(f"{hello.epoch} of {hello.pipeline_id} is not the one that counts")
        if hello.to_stage != num_stages:
            raise ProtocolError(
                f"a stream to stage {hello.to_stage} came to the scheduler, which follows stage "
                f"{num_stages - 1}"
            )
        if self._accepted.get(hello.pipeline_id) == hello.epoch:
            raise ProtocolError(f"{hello.epoch} of {hello.pipeline_id} has its results' stream")
        self._accepted[hello.pipeline_id] = hello.epoch

    async def receive(self, hello: Hello, message: Message) -> None:
        if not isinstance(message, StepResult):
            raise ProtocolError("a step was sent to the scheduler")
        if (message.pipeline_id, message.epoch) != (hello.pipeline_id, hello.epoch):
            raise StaleEpoch(f"a result of {message.epoch} came by a stream of {hello.epoch}")
        self._owner.result_came(message)

    async def broken(self, hello: Hello, error: StageMeshError | None) -> None:
        if self._accepted.get(hello.pipeline_id) == hello.epoch:
            reason = error or PeerLost("the last stage ended its stream")
            self._owner.stream_broken(hello.pipeline_id, hello.epoch, reason)
