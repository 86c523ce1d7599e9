"""The epochs that a worker is in: of two pipelines at once, each with its own end of the pages."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.lone_worker import NUM_BLOCKS, TIMEOUT_S, worker
from support.scripted_scheduler import until

from stage_worker.place import PageOrigin
from stagemesh.errors import ProtocolError, StaleEpoch, StepTimeout
from stagemesh.page_frames import PageBatch, PagesRequest
from stagemesh.page_stream import page_handlers
from stagemesh.plan import Epoch
from stagemesh.rpc import RpcServer
from stagemesh.transport import StepFrame


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


class Source:
    """Gives block 3, and says that there is no more once it is told to."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()

    async def pages(self, request: PagesRequest) -> AsyncGenerator[PageBatch]:
        yield PageBatch((3,), "float32", "float32", 1, 0, 0, b"x")
        await self.may_end.wait()


@asynccontextmanager
async def page_source() -> AsyncIterator[tuple[Source, PageOrigin]]:
    source, server = Source(), RpcServer("127.0.0.1:0")
    server.server.add_generic_rpc_handlers((page_handlers(source),))
    try:
        yield source, PageOrigin(await server.start(), (3,))
    finally:
        await server.stop(0)


async def test_pages_come_to_the_end_of_their_pipeline() -> None:
    async with worker() as mine, page_source() as (source, origin):
        source.may_end.set()
        await mine.join("q", 16, from_end=True, pages=origin)
        assert mine.told[1:] == [("write", NUM_BLOCKS - 4)]


async def test_pages_that_come_late_are_not_written_where_another_pipeline_is() -> None:
    """What still waits for the device when the epoch ends is dropped."""
    async with worker() as mine, page_source() as (_, origin):
        number = mine.command("q", 32, from_end=True, pages=origin)
        await until(lambda: len(mine.told) == 1, "the join")
        device_may_go_on = threading.Event()
        mine.device.submit(lambda: device_may_go_on.wait(TIMEOUT_S))
        await until(lambda: mine.device.num_unfinished == 2, "the pages")
        mine.membership.leave("q", Epoch(1, number))
        mine.command("p", 32)
        device_may_go_on.set()
        assert (await mine.heard())[:2] == ("joined", "p")
        assert mine.told == [("join", "q", 32, False), ("join", "p", 32, False)]
