"""A worker that takes another's place gets its pages, or says that they did not come."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncGenerator, AsyncIterator

import pytest
from support.paths import DEMO_MODEL
from support.stages import Chain, Live, Wish
from support.worker_links import (
    LinkScheduler,
    WorkerLink,
    link_scheduler,
    local_worker,
    push_to,
    worker_process,
)

from stage_worker import page_service
from stagemesh.errors import ProtocolError, StaleEpoch
from stagemesh.frames import StepFrame
from stagemesh.page_frames import PageBatch, PagesRequest
from stagemesh.page_stream import fetch_pages, page_handlers
from stagemesh.plan import Epoch, Span, Step
from stagemesh.rpc import RpcServer
from stagemesh.transport import PushStream

NUM_LAYERS = 6
WISH = Wish(prompt=[0, 31, 57, 200, *range(300, 330)], max_tokens=8)
BLOCKS = (9, 3, 4, 7, 2, 6)


async def workers(
    scheduler: LinkScheduler, stack: contextlib.AsyncExitStack, spans: list[tuple[int, int]]
) -> list[WorkerLink]:
    """Workers in this process with these spans, in order."""
    links = []
    for start, end in spans:
        worker = local_worker(DEMO_MODEL, scheduler.address, block_size_tokens=8)
        await stack.enter_async_context(worker)
        links.append(await scheduler.worker())
        await links[-1].load(start, end)
    return links


@contextlib.asynccontextmanager
async def begun(
    scheduler: LinkScheduler, links: list[WorkerLink], epoch: Epoch, *, keep_kv: bool = False
) -> AsyncIterator[PushStream]:
    await scheduler.form(links, epoch, keep_kv=keep_kv)
    stream = await push_to(links[0], epoch)
    try:
        yield stream
    finally:
        await stream.abandon()


async def generate(
    scheduler: LinkScheduler, stream: PushStream, epoch: Epoch, live: Live, num_tokens: int
) -> None:
    live.first = True
    for number in range(num_tokens):
        row = live.row(2, 12)
        await stream.send(StepFrame(Step("p", epoch, number, (row,))))
        live.take(row, (await scheduler.result()).rows[0])


def new_live() -> Live:
    return Live(1, WISH, BLOCKS, list(WISH.prompt))


def reference() -> list[int]:
    return Chain(DEMO_MODEL, 1).run([WISH])[0].tokens


@pytest.mark.parametrize("moved", [0, 1], ids=["first stage", "last stage"])
async def test_a_span_moves_with_its_pages(moved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the stream goes on with the tokens of an undisturbed run."""
    monkeypatch.setattr(page_service, "BATCH_BYTES", 1)  # a block at a time
    live = new_live()
    spans = [(0, 3), (3, NUM_LAYERS)]
    async with link_scheduler() as scheduler, contextlib.AsyncExitStack() as stack:
        links = await workers(scheduler, stack, [*spans, spans[moved]])
        spare = links.pop()
        first, second = Epoch(1, 1), Epoch(1, 2)
        async with begun(scheduler, links, first) as stream:
            await generate(scheduler, stream, first, live, 6)
            old, links[moved] = links[moved], spare
            addresses = [links[1].address, scheduler.address]
            for stage, (link, address) in enumerate(zip(links, addresses, strict=True)):
                origin = {"pages_from": old.address, "block_ids": BLOCKS[:5]}
                fetched = origin if link is spare else {"keep_kv": True}
                link.join(second, stage, 2, address, **fetched)  # type: ignore[arg-type]
            joined = await spare.expect("epoch_joined")
            assert joined.has_pages
            assert (await spare.next_stats()).blocks_received == 5
        stream = await push_to(links[0], second)
        await generate(scheduler, stream, second, live, 4)
        await stream.abandon()
        with pytest.raises(StaleEpoch):  # what gave its pages takes no step of that epoch
            await push_to(old, second)
        assert live.tokens == reference()


async def has_pages(spare: WorkerLink, scheduler: LinkScheduler, n: int, source: str) -> bool:
    """Whether pages come from `source` when the spare joins as the last stage."""
    address = scheduler.address
    spare.join(Epoch(1, n), 1, 2, address, pages_from=source, block_ids=BLOCKS)
    joined = await spare.expect("epoch_joined")
    assert joined.epoch.n == n
    return bool(joined.has_pages)


async def test_pages_that_cannot_be_had_are_no_end() -> None:
    """Of another span, of another pipeline, of another dtype, from nobody: the epoch is joined."""
    async with link_scheduler() as scheduler, contextlib.AsyncExitStack() as stack:
        links = await workers(scheduler, stack, [(0, 3), (3, NUM_LAYERS), (3, NUM_LAYERS)])
        spare = links.pop()
        assert not await has_pages(spare, scheduler, 1, links[1].address), "it never joined"
        narrow = local_worker(DEMO_MODEL, scheduler.address, block_size_tokens=8, dtype="bfloat16")
        await stack.enter_async_context(narrow)
        other = await scheduler.worker()
        await other.load(3, NUM_LAYERS)
        async with begun(scheduler, links, Epoch(1, 2)):
            assert not await has_pages(spare, scheduler, 3, links[0].address), "another span"
            assert not await has_pages(spare, scheduler, 4, "127.0.0.1:1"), "nobody"
            assert not await has_pages(other, scheduler, 5, links[1].address), "another dtype"
            assert await has_pages(spare, scheduler, 6, links[1].address)
            request = PagesRequest("p", Epoch(1, 4), Span(3, NUM_LAYERS), BLOCKS)
            with pytest.raises(StaleEpoch):
                await anext(fetch_pages(links[1].address, request, ping_timeout_s=10))


async def test_pages_that_are_used_again_are_not_given() -> None:
    async with link_scheduler() as scheduler, contextlib.AsyncExitStack() as stack:
        (link,) = await workers(scheduler, stack, [(0, NUM_LAYERS)])
        span = Span(0, NUM_LAYERS)
        async with begun(scheduler, [link], Epoch(1, 1)):
            request = PagesRequest("p", Epoch(1, 3), span, BLOCKS)
            batches = fetch_pages(link.address, request, ping_timeout_s=10)
            assert [batch.block_ids async for batch in batches] == [tuple(sorted(BLOCKS))]
            assert (await link.next_stats()).sequences_held == 0
        await link.load(0, NUM_LAYERS)
        with pytest.raises(ProtocolError, match="no KV of p is held"):
            await anext(fetch_pages(link.address, request, ping_timeout_s=10))


class HalfASource:
    """Gives one block, and then nothing more, saying that it lives."""

    def __init__(self, batch: PageBatch) -> None:
        self.batch = batch
        self.given = asyncio.Event()

    async def pages(self, request: PagesRequest) -> AsyncGenerator[PageBatch]:
        yield self.batch
        self.given.set()
        await asyncio.Event().wait()


async def test_a_source_that_ends_in_the_middle() -> None:
    async with link_scheduler() as scheduler, contextlib.AsyncExitStack() as stack:
        links = await workers(scheduler, stack, [(3, NUM_LAYERS), (3, NUM_LAYERS)])
        async with begun_last(scheduler, links[0]):
            request = PagesRequest("p", Epoch(1, 2), Span(3, NUM_LAYERS), BLOCKS[:1])
            batch = await anext(fetch_pages(links[0].address, request, ping_timeout_s=10))
        source = HalfASource(batch)
        server = RpcServer("127.0.0.1:0")
        server.server.add_generic_rpc_handlers((page_handlers(source),))
        asking = asyncio.create_task(has_pages(links[1], scheduler, 3, await server.start()))
        await source.given.wait()
        assert (await links[1].next_stats()).blocks_received <= 1
        assert not asking.done()
        await server.stop(0)
        assert not await asking


@contextlib.asynccontextmanager
async def begun_last(
    scheduler: LinkScheduler, link: WorkerLink, num_blocks: int = 32
) -> AsyncIterator[None]:
    link.join(Epoch(1, 1), 1, 2, scheduler.address, num_blocks=num_blocks)
    await link.expect("epoch_joined")
    yield


async def test_a_source_that_is_killed_in_the_middle() -> None:
    """Two processes and some hundred megabytes."""
    flags = ("--block-size", "1024", "--num-blocks", "400")
    async with (
        link_scheduler() as scheduler,
        worker_process(DEMO_MODEL, scheduler.address, *flags) as source,
        local_worker(
            DEMO_MODEL, scheduler.address, block_size_tokens=1024, num_blocks=400, worker_id="spare"
        ),
    ):
        links = [await scheduler.worker() for _ in range(2)]
        links.sort(key=lambda link: link.registration.worker_id == "spare")
        for link in links:
            await link.load(3, NUM_LAYERS)
        old, spare = links
        async with begun_last(scheduler, old, num_blocks=400):
            spare.join(
                *(Epoch(1, 2), 1, 2, scheduler.address),
                pages_from=old.address,
                block_ids=range(400),
                num_blocks=400,
            )
            while not (await spare.next_stats()).blocks_received:
                pass
            source.signal(signal.SIGKILL)
            joined = await spare.expect("epoch_joined")
        received = (await spare.next_stats()).blocks_received
        print(f"{received} blocks of 400 came")
        assert 0 < received < 400
        assert not joined.has_pages
