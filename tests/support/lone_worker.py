"""A worker's membership without its process: the scheduler's commands in, its reports out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from support.paths import DEMO_MODEL

from stage_worker.block_ranges import PipelineBlocks
from stage_worker.device_thread import DeviceThread
from stage_worker.executor import StageExecutor, StageOutput
from stage_worker.executor_config import ExecutorFacts
from stage_worker.membership import Membership
from stage_worker.place import Patience, Place
from stage_worker.span_holder import HeldSpan
from stage_worker.stats import Stats
from stage_worker.step_cost import StepCost
from stage_worker.tenancy import Joining
from stagemesh.errors import ProtocolError, StageMeshError
from stagemesh.model_spec import ModelSpec
from stagemesh.page_frames import PageBatch, PagesRequest
from stagemesh.plan import Epoch, Span, Step
from stagemesh.rpc import RpcServer
from stagemesh.transport import Hello, Message, StepFrame, push_handlers

TIMEOUT_S = 30.0
NUM_BLOCKS, NUM_LOGGED = 32, 32
SPAN = Span(0, 3)


class Recorder:
    """In place of an executor: notes what it is told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self.pages = self

    def write(self, batch: PageBatch, blocks: PipelineBlocks) -> None:
        self.told.append(("write", *blocks.kv.places(batch.block_ids)))

    def join(self, joining: Joining) -> None:
        told = joining.pipeline_id, joining.blocks.kv.num_blocks, joining.keep_kv
        self.told.append(("join", *told))

    def execute(self, step: Step, *_: object) -> StageOutput:
        self.told.append(("step", step.pipeline_id, step.step))
        return StageOutput(memoryview(b""), 0, 0, "", ())


class NextStage:
    """Takes whatever is pushed to it."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[Message] = asyncio.Queue()

    async def accept(self, hello: Hello) -> None:
        pass

    async def receive(self, hello: Hello, message: Message) -> None:
        self.received.put_nowait(message)

    async def broken(self, hello: Hello, error: StageMeshError | None) -> None:
        pass


@dataclass
class Reports:
    said: asyncio.Queue[tuple[str, str, int, StageMeshError | None]] = field(
        default_factory=asyncio.Queue
    )

    def joined(self, place: Place, has_pages: bool) -> None:
        self.said.put_nowait(("joined", place.pipeline_id, place.epoch.n, None))

    def broken(self, place: Place, error: StageMeshError, peer_address: str) -> None:
        self.said.put_nowait(("broken", place.pipeline_id, place.epoch.n, error))


def held_span(num_log_blocks: int = NUM_LOGGED) -> HeldSpan:
    executor = cast(StageExecutor, Recorder())
    facts = ExecutorFacts(NUM_BLOCKS, 8, 0, 0, 0, num_log_blocks)
    return HeldSpan(SPAN, facts, executor, StepCost(ModelSpec.from_directory(DEMO_MODEL), SPAN))


@dataclass
class Worker:
    """A membership, and the scheduler's word to it. Epochs of all pipelines are numbered alike."""

    membership: Membership
    reports: Reports
    next_stage: NextStage
    next_address: str
    device: DeviceThread
    held: HeldSpan
    last_epoch: int = 0

    @property
    def told(self) -> list[tuple[object, ...]]:
        return cast(Recorder, self.held.executor).told

    def command(self, pipeline_id: str, num_blocks: int, **place: Any) -> int:
        self.last_epoch += 1
        epoch = Epoch(1, self.last_epoch)
        chosen = {"keep_kv": False, **place}
        where = Place(pipeline_id, epoch, 0, 2, self.next_address, num_blocks, **chosen)
        self.membership.join(where, self.held)
        return self.last_epoch

    async def heard(self) -> tuple[str, str, int, StageMeshError | None]:
        return await asyncio.wait_for(self.reports.said.get(), TIMEOUT_S)

    async def join(self, pipeline_id: str, num_blocks: int, **place: Any) -> Hello:
        number = self.command(pipeline_id, num_blocks, **place)
        assert await self.heard() == ("joined", pipeline_id, number, None)
        return Hello(pipeline_id, Epoch(1, number), 0, "scheduler")

    async def is_refused(self, why: str, pipeline_id: str, num_blocks: int, **place: Any) -> None:
        number = self.command(pipeline_id, num_blocks, **place)
        kind, *whose, error = await self.heard()
        assert (kind, whose) == ("broken", [pipeline_id, number])
        assert isinstance(error, ProtocolError)
        assert why in str(error)

    async def stream(self, hello: Hello) -> None:
        await asyncio.wait_for(self.membership.accept(hello), TIMEOUT_S)

    async def step(self, hello: Hello, number: int) -> None:
        step = Step(hello.pipeline_id, hello.epoch, number, ())
        await self.membership.receive(hello, StepFrame(step))

    def pages(self, pipeline_id: str, n: int, *block_ids: int) -> PagesRequest:
        return PagesRequest(pipeline_id, Epoch(1, n), SPAN, block_ids)


@asynccontextmanager
async def worker(num_log_blocks: int = NUM_LOGGED) -> AsyncIterator[Worker]:
    next_stage, server, device = NextStage(), RpcServer("127.0.0.1:0"), DeviceThread()
    server.server.add_generic_rpc_handlers((push_handlers(next_stage),))
    address = await server.start()
    reports = Reports()
    try:
        async with asyncio.TaskGroup() as group:
            membership = Membership(group, device, Stats(), reports, Patience())
            held = held_span(num_log_blocks)
            yield Worker(membership, reports, next_stage, address, device, held)
            membership.leave()
    finally:
        await server.stop(0)
        assert await device.stop(TIMEOUT_S)
