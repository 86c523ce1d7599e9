"""Looks at a mesh's scheduler before, during and after a load, so that its stages can be judged."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio

from stagemesh.bench.stage_usage import StageUsage, Status, has_caught_up, stage_usage, steady_pair
from stagemesh.cli.client import connection, get_status
from stagemesh.rpc import error_from_rpc

# Workers report twice a second.
LOOK_INTERVAL_S = 0.2
CATCH_UP_S = 2.0


@dataclass(slots=True)
class Looks:
    """`after` is there once the load has ended."""

    before: Status
    during: list[Status] = field(default_factory=list)
    after: Status | None = None

    def usage(self) -> list[StageUsage]:
        assert self.after is not None
        pair = steady_pair(self.before, self.during, self.after)
        return stage_usage(self.before, self.after, pair)

    def num_workers(self) -> int:
        """Those that take part, spares not counted."""
        assert self.after is not None
        return len({name for pipeline in self.after.pipelines for name in pipeline.worker_ids})

    def lone_step_ms(self) -> float:
        """Compute of one recent step, over all stages: of decoding, where that came last."""
        assert self.after is not None
        timings = [t for pipeline in self.after.pipelines[:1] for t in pipeline.mean_timings]
        return sum(timing.compute_ns for timing in timings) / 1e6


class Meter:
    """Of the mesh whose scheduler is at the other end of `channel`.

    `first` is a look before any load: from there on it can tell how far the workers' reports lag.
    """

    def __init__(self, channel: grpc.aio.Channel, first: Status) -> None:
        self._channel = channel
        self._first = first

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[Looks]:
        """Looks while the block runs, and once more when the workers have told all of it."""
        looks = Looks(await self._caught_up(self._first))
        watching = asyncio.create_task(self._watch(looks))
        try:
            yield looks
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        looks.after = await self._caught_up(looks.before)

    async def _watch(self, looks: Looks) -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                looks.during.append(await get_status(self._channel))
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def _caught_up(self, since: Status) -> Status:
        give_up_s = time.monotonic() + CATCH_UP_S
        while True:
            status = await _look(self._channel)
            if has_caught_up(since, status) or time.monotonic() > give_up_s:
                return status
            await asyncio.sleep(LOOK_INTERVAL_S)


@asynccontextmanager
async def meter(scheduler: str) -> AsyncIterator[Meter]:
    """Raises PeerLost where no scheduler answers."""
    async with connection(scheduler, "scheduler") as channel:
        yield Meter(channel, await get_status(channel))


async def _look(channel: grpc.aio.Channel) -> Status:
    try:
        return await get_status(channel)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from None
