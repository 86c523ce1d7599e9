"""Real workers of which one is a stage of two pipelines: what ends one does not touch the other."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from grpc_health.v1 import health_pb2, health_pb2_grpc
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

from stagemesh.frames import StepFrame
from stagemesh.plan import Epoch, Row, Step
from stagemesh.rpc import make_channel
from stagemesh.transport import SERVICE_NAME, PushStream

NUM_LAYERS = 6
NUM_BLOCKS, BLOCK_SIZE = 32, 8
FLAGS = ("--block-size", str(BLOCK_SIZE))
BLOCKS = (9, 3, 4, 7, 2, 6)
WISHES = {
    "p": Wish(prompt=[0, 31, 57, 200, *range(300, 330)], max_tokens=8),
    "q": Wish(prompt=[0, 999, 5, 77, 1500, 42, *range(700, 720)], max_tokens=12),
}
EPOCHS = itertools.count(1)


def reference(name: str) -> list[int]:
    return Chain(DEMO_MODEL, 1, num_blocks=NUM_BLOCKS).run([WISHES[name]])[0].tokens


@dataclass
class Pipeline:
    """Two stages and one sequence, with the same ids of sequence and blocks as any other one."""

    scheduler: LinkScheduler
    name: str
    links: list[WorkerLink]
    from_end: list[bool]
    live: Live = field(init=False)
    epoch: Epoch = field(default_factory=lambda: Epoch(1, next(EPOCHS)))
    stream: PushStream | None = None
    number: int = 0

    def __post_init__(self) -> None:
        wish = WISHES[self.name]
        self.live = Live(1, wish, BLOCKS, list(wish.prompt))

    async def begin(
        self, *, fresh: tuple[int, ...] = (), pages_from: str = "", num_blocks: int = 16
    ) -> None:
        """All stages join, and keep what they have, but for those that are `fresh`."""
        await self.end()
        self.epoch = Epoch(1, next(EPOCHS))
        self.join(fresh, pages_from, num_blocks)
        for stage, link in enumerate(self.links):
            joined = await link.expect("epoch_joined")
            assert (joined.pipeline_id, joined.epoch.n) == (self.name, self.epoch.n)
            assert joined.has_pages == (stage in fresh and bool(pages_from))
        self.stream = await push_to(self.links[0], self.epoch, self.name)
        self.live.first = True
        self.number = 0

    def join(self, fresh: tuple[int, ...], pages_from: str, num_blocks: int) -> None:
        addresses = [self.links[1].address, self.scheduler.address]
        for stage, (link, address) in enumerate(zip(self.links, addresses, strict=True)):
            link.join(
                *(self.epoch, stage, 2, address),
                pipeline_id=self.name,
                num_blocks=num_blocks,
                from_end=self.from_end[stage],
                keep_kv=stage not in fresh,
                pages_from=pages_from if stage in fresh else "",
                block_ids=BLOCKS,
            )

    async def send(self, row: Row) -> None:
        step = Step(self.name, self.epoch, self.number, (row,))
        self.number += 1
        assert self.stream is not None
        await self.stream.send(StepFrame(step))

    async def end(self) -> None:
        for link in self.links:
            link.leave(self.epoch, self.name)
        if self.stream is not None:
            await self.stream.abandon()
            self.stream = None


async def turn(*pipelines: Pipeline, num_steps: int = 1) -> None:
    """A step of each, under way at the same time."""
    scheduler = pipelines[0].scheduler
    for _ in range(num_steps):
        rows = {each.name: each.live.row(2, 12) for each in pipelines}
        for each in pipelines:
            await each.send(rows[each.name])
        for _ in pipelines:
            result = await scheduler.result()
            (whose,) = [each for each in pipelines if each.name == result.pipeline_id]
            assert (result.epoch, result.step) == (whose.epoch, whose.number - 1)
            whose.live.take(rows[whose.name], result.rows[0])


async def finish(*pipelines: Pipeline) -> None:
    for each in pipelines:
        while not each.live.done:
            await turn(each)
        assert each.live.tokens == reference(each.name)
        await each.end()


@contextlib.asynccontextmanager
async def workers(scheduler: LinkScheduler) -> AsyncIterator[dict[str, WorkerLink]]:
    """One for the first stage, and one for the second, which is a process of its own."""
    async with (
        local_worker(DEMO_MODEL, scheduler.address, worker_id="a", block_size_tokens=BLOCK_SIZE),
        worker_process(DEMO_MODEL, scheduler.address, "--worker-id", "shared", *FLAGS),
    ):
        yield await registered(scheduler, a=(0, 3), shared=(3, NUM_LAYERS))


async def registered(scheduler: LinkScheduler, **spans: tuple[int, int]) -> dict[str, WorkerLink]:
    """Workers by their ids, in whatever order they come, with these spans."""
    links = {}
    for _ in spans:
        link = await scheduler.worker()
        links[link.registration.worker_id] = link
    for name, span in spans.items():
        await links[name].load(*span)
    return links


async def is_in_epoch(link: WorkerLink) -> bool:
    async with make_channel(link.address) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def test_a_replicas_worker_stands_in_for_one_that_was_killed() -> None:
    """The second stages of p and q are one worker. What kills q's first one is nothing to p, whose
    first stage becomes that of q as well: its KV is rebuilt there, the second keeps what it has."""
    async with link_scheduler() as scheduler, workers(scheduler) as links:
        flags = ("--worker-id", "b", *FLAGS)
        async with worker_process(DEMO_MODEL, scheduler.address, *flags) as dying:
            links |= await registered(scheduler, b=(0, 3))
            p = Pipeline(scheduler, "p", [links["a"], links["shared"]], [False, False])
            q = Pipeline(scheduler, "q", [links["b"], links["shared"]], [False, True])
            await p.begin(fresh=(0, 1))
            await q.begin(fresh=(0, 1))
            await turn(p, q, num_steps=5)
            assert (await links["shared"].next_stats()).sequences_held == 2
            dying.signal(signal.SIGKILL)
            broken = await links["shared"].expect("epoch_broken")
            assert (broken.pipeline_id, broken.epoch.n) == ("q", q.epoch.n)
            assert broken.peer_address == links["b"].address
            await turn(p)
            assert await is_in_epoch(links["shared"])
        q.links[0], q.from_end[0] = links["a"], True
        await q.begin(fresh=(0,))
        await q.send(q.live.rebuild_row(0, q.live.computed, range(1), 0))
        assert (await scheduler.result()).rows[0].sampled == ()
        q.live.first = False
        assert (await links["a"].next_stats()).sequences_held == 2
        await turn(p, q, num_steps=2)
        await finish(p, q)


async def test_one_pipeline_grows_where_the_other_has_ended() -> None:
    """But not where it runs; and it makes room again."""
    async with link_scheduler() as scheduler, workers(scheduler) as links:
        both = [links["a"], links["shared"]]
        p = Pipeline(scheduler, "p", both, [False, False])
        q = Pipeline(scheduler, "q", both, [True, True])
        await p.begin(fresh=(0, 1))
        await q.begin(fresh=(0, 1))
        await turn(p, q, num_steps=4)
        await q.end()
        assert await is_in_epoch(links["shared"])
        await turn(p)
        await p.begin(num_blocks=NUM_BLOCKS)
        await turn(p)
        q.epoch = Epoch(1, next(EPOCHS))
        q.join((), "", num_blocks=16)
        for link in both:
            broken = await link.expect("epoch_broken")
            assert (broken.pipeline_id, broken.error.code) == ("q", "protocol")
            assert "are those of p" in broken.error.message
        await turn(p)
        await p.begin()
        await q.begin()
        await turn(p, q, num_steps=2)
        await finish(p, q)


async def test_pages_of_one_pipeline_leave_while_the_other_goes_on() -> None:
    """From the end of the shared worker's memory to the start of the successor's."""
    async with link_scheduler() as scheduler, workers(scheduler) as links:
        options = {"worker_id": "spare", "block_size_tokens": BLOCK_SIZE}
        async with local_worker(DEMO_MODEL, scheduler.address, **options):
            links |= await registered(scheduler, spare=(3, NUM_LAYERS))
            p = Pipeline(scheduler, "p", [links["a"], links["shared"]], [False, False])
            q = Pipeline(scheduler, "q", [links["a"], links["shared"]], [True, True])
            await p.begin(fresh=(0, 1))
            await q.begin(fresh=(0, 1))
            await turn(p, q, num_steps=5)
            await q.end()
            q.links, q.from_end = [links["a"], links["spare"]], [True, False]
            moving = asyncio.create_task(q.begin(fresh=(1,), pages_from=links["shared"].address))
            await turn(p, num_steps=2)
            await moving
            await turn(p, q, num_steps=2)
            await finish(p, q)
