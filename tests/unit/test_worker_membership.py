"""The epochs that a worker is in: of two pipelines at once, each with its own end of the pages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from support.paths import DEMO_MODEL

from stage_worker.block_ranges import PipelineBlocks
from stage_worker.device_thread import DeviceThread
from stage_worker.executor import StageExecutor, StageOutput
from stage_worker.loading import ExecutorFacts
from stage_worker.membership import Membership
from stage_worker.place import Patience, Place
from stage_worker.span_holder import HeldSpan
from stage_worker.stats import Stats
from stage_worker.step_cost import StepCost
from stagemesh.errors import ProtocolError, StageMeshError, StaleEpoch, StepTimeout
from stagemesh.model_spec import ModelSpec
from stagemesh.page_frames import PagesRequest
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

    def join(self, *, pipeline_id: str, blocks: PipelineBlocks, keep_kv: bool, **_: int) -> None:
        self.told.append(("join", pipeline_id, blocks.kv.num_blocks, keep_kv))

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
    async with asyncio.TaskGroup() as group:
        membership = Membership(group, device, Stats(), reports, Patience())
        yield Worker(membership, reports, next_stage, address, held_span(num_log_blocks))
        membership.leave()
    await server.stop(0)
    assert await device.stop(TIMEOUT_S)


async def test_two_pipelines_are_served_in_the_order_of_what_comes() -> None:
    async with worker() as mine:
        hellos = [await mine.join("p", 20), await mine.join("q", 12, from_end=True)]
        for hello in hellos:
            await mine.stream(hello)
        for number in range(3):
            for hello in reversed(hellos):
                await mine.step(hello, number)
        pushed = [await asyncio.wait_for(mine.next_stage.received.get(), 10) for _ in range(6)]
        assert mine.told[:2] == [("join", "p", 20, False), ("join", "q", 12, False)]
        assert mine.told[2:] == [("step", name, i) for i in range(3) for name in ("q", "p")]
        for name in ("p", "q"):
            steps = [m.step for m in pushed if isinstance(m, StepFrame)]
            assert [step.step for step in steps if step.pipeline_id == name] == [0, 1, 2]


async def test_ranges_that_meet_are_refused_while_the_other_pipeline_runs() -> None:
    async with worker() as mine:
        first = await mine.join("p", 20)
        await mine.is_refused("are those of p", "q", 13, from_end=True)
        assert mine.membership.in_epoch
        last = await mine.join("q", 12, from_end=True)
        await mine.is_refused("are those of q", "p", 21, keep_kv=True)
        mine.membership.leave("q", last.epoch)
        with pytest.raises(StaleEpoch):
            await mine.step(last, 0)
        await mine.stream(first)
        await mine.step(first, 0)
        await mine.join("p", 32, keep_kv=True)


async def test_logs_that_meet_are_refused_as_well() -> None:
    async with worker(num_log_blocks=8) as mine:
        await mine.join("p", 16)
        await mine.is_refused("are those of p", "q", 16, from_end=True)
        await mine.join("p", 16, num_log_blocks=4, keep_kv=True)
        await mine.is_refused("are those of p", "q", 16, from_end=True, num_log_blocks=5)
        await mine.join("q", 16, from_end=True, num_log_blocks=4)
        await mine.is_refused("9 blocks cannot be logged", "p", 16, num_log_blocks=9)


async def test_one_shrinks_then_the_other_joins() -> None:
    """Both commands at once, as the scheduler gives them; and back again."""
    async with worker() as mine:
        await mine.join("p", 32)
        mine.command("p", 16, keep_kv=True)
        mine.command("q", 16, from_end=True)
        assert {(await mine.heard())[:2] for _ in range(2)} == {("joined", "p"), ("joined", "q")}
        assert mine.told[1:] == [("join", "p", 16, True), ("join", "q", 16, False)]
        mine.command("q", 4, from_end=True, keep_kv=True)
        mine.command("p", 28, keep_kv=True)
        assert {(await mine.heard())[:2] for _ in range(2)} == {("joined", "p"), ("joined", "q")}
        assert mine.told[3:] == [("join", "q", 4, True), ("join", "p", 28, True)]


async def test_a_dead_pipeline_is_not_in_the_way() -> None:
    """Its pages are taken; what is left of them is given away, and it may come back."""
    async with worker() as mine:
        first = await mine.join("p", 32)
        mine.membership.leave("p", first.epoch)
        last = await mine.join("q", 24, from_end=True)
        claim = mine.membership.give_up(mine.pages("p", 10))
        assert claim.blocks.order((7, 0)) == (0, 7)
        with pytest.raises(ProtocolError, match="8 blocks here"):
            claim.blocks.order((8,))
        mine.last_epoch = 20
        await mine.is_refused("are those of q", "p", 9, keep_kv=True)
        await mine.join("p", 8, keep_kv=True)
        mine.membership.leave("q", last.epoch)
        await mine.join("p", 32, keep_kv=True)
        await mine.is_refused("are those of p", "q", 1, from_end=True, keep_kv=True)


async def test_kv_is_claimed_at_the_end_where_it_lies() -> None:
    async with worker() as mine:
        before = await mine.join("p", 8)
        await mine.is_refused("no KV of p", "p", 8, from_end=True, keep_kv=True)
        await mine.stream(before)
        await mine.join("p", 8, from_end=True)
        with pytest.raises(StaleEpoch):
            await mine.step(before, 0)
        await mine.is_refused("no KV of p", "p", 8, keep_kv=True)
        await mine.join("p", 12, from_end=True, keep_kv=True)
        await mine.join("q", 20)


async def test_who_joins_at_an_end_takes_it_from_who_was_there() -> None:
    async with worker() as mine:
        first = await mine.join("p", 16)
        last = await mine.join("q", 16, from_end=True)
        await mine.stream(last)
        await mine.join("r", 16)
        await mine.is_refused("no KV of p", "p", 16, keep_kv=True)
        with pytest.raises(StaleEpoch):
            await mine.step(first, 0)
        await mine.step(last, 0)
        assert isinstance(await mine.next_stage.received.get(), StepFrame)
        await mine.join("r", 16, keep_kv=True)
        await mine.join("q", 16, from_end=True, keep_kv=True)


async def test_loading_forgets_all() -> None:
    async with worker() as mine:
        await mine.join("p", 16)
        await mine.join("q", 16, from_end=True)
        mine.membership.forget_kv()
        assert not mine.membership.in_epoch
        assert not mine.membership.has_kv
        await mine.is_refused("no KV of p", "p", 16, keep_kv=True)
        await mine.is_refused("no KV of q", "q", 16, from_end=True, keep_kv=True)


async def test_a_scheduler_that_is_away_takes_no_kv_with_it() -> None:
    async with worker() as mine:
        await mine.join("p", 16)
        await mine.join("q", 16, from_end=True)
        mine.membership.leave()
        assert not mine.membership.in_epoch
        await mine.join("q", 16, from_end=True, keep_kv=True)
        await mine.join("p", 16, keep_kv=True)


async def test_a_broken_stream_ends_the_epoch_that_it_is_of() -> None:
    async with worker() as mine:
        first, last = await mine.join("p", 16), await mine.join("q", 16, from_end=True)
        for hello in (first, last):
            await mine.stream(hello)
        await mine.membership.broken(first, None)
        assert (await mine.heard())[:2] == ("broken", "p")
        assert mine.membership.in_epoch
        await mine.step(last, 0)
        assert isinstance(await mine.next_stage.received.get(), StepFrame)
        await mine.join("p", 16, keep_kv=True)


async def test_a_device_that_hangs_is_the_end_of_both() -> None:
    async with worker() as mine:
        await mine.join("p", 16)
        await mine.join("q", 16, from_end=True)
        mine.membership.fail(StepTimeout("it hangs"))
        heard = [await mine.heard() for _ in range(2)]
        assert [said[:2] for said in heard] == [("broken", "p"), ("broken", "q")]
        assert all(isinstance(said[3], StepTimeout) for said in heard)
        assert not mine.membership.in_epoch


async def test_pages_of_one_pipeline_are_given_while_the_other_goes_on() -> None:
    async with worker() as mine:
        first = await mine.join("p", 16)
        last = await mine.join("q", 8, from_end=True)
        await mine.stream(last)
        with pytest.raises(ProtocolError, match="no KV of r"):
            mine.membership.give_up(mine.pages("r", 9))
        with pytest.raises(ProtocolError, match="was joined here"):
            mine.membership.give_up(mine.pages("p", first.epoch.n))
        request = mine.pages("p", 9)
        claim = mine.membership.give_up(request)
        assert claim.blocks.kv.places((3,)) == [3]
        with pytest.raises(StaleEpoch):
            await mine.step(first, 0)
        await mine.step(last, 0)
        assert isinstance(await mine.next_stage.received.get(), StepFrame)
        assert mine.membership.keeps_still(request, claim)
        await mine.join("q", 16, from_end=True, keep_kv=True)
        assert mine.membership.keeps_still(request, claim), "it grew into what is nobody's"
        await mine.join("q", 17, from_end=True, keep_kv=True)
        assert not mine.membership.keeps_still(request, claim)
        other = mine.membership.give_up(mine.pages("q", 9))
        assert other.blocks.kv.places((3,)) == [NUM_BLOCKS - 4]
