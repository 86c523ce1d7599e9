"""Layers that are loaded no further, by the counts of the ranks."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections.abc import AsyncIterator

import pytest

from stage_worker import awake_time
from stage_worker.load_watch import LoadProgress, watch_load
from stage_worker.rank_options import memory_bytes
from stagemesh.errors import LoadStalled

LIMIT_S = 0.3


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awake_time, "LOOK_S", 0.02)


@contextlib.asynccontextmanager
async def watched(progress: LoadProgress) -> AsyncIterator[asyncio.Task[LoadStalled]]:
    watching = asyncio.create_task(watch_load(progress, LIMIT_S))
    yield watching
    watching.cancel()
    await asyncio.wait([watching])


async def told(watching: asyncio.Task[LoadStalled]) -> str:
    async with asyncio.timeout(30):
        return str(await watching)


async def goes_on(watching: asyncio.Task[LoadStalled], progress: LoadProgress, *ranks: int) -> None:
    """For several times the limit these ranks read."""
    for _ in range(30):
        for rank in ranks:
            progress.advance(rank)
        done, _ = await asyncio.wait([watching], timeout=LIMIT_S / 10)
        assert not done, watching.result()


async def test_a_load_that_stops_is_found_and_one_that_goes_on_is_not() -> None:
    progress = LoadProgress()
    async with watched(progress) as watching:
        await goes_on(watching, progress)  # nothing is loaded: nothing to wait for
        progress.begin(0)
        await goes_on(watching, progress, 0)
        assert (await told(watching)).startswith("this worker has got no further")


async def test_what_has_loaded_is_not_waited_for() -> None:
    progress = LoadProgress()
    async with watched(progress) as watching:
        progress.begin(0)
        progress.end(0)
        done, _ = await asyncio.wait([watching], timeout=3 * LIMIT_S)
        assert not done


async def test_a_rank_that_stops_is_named_while_others_go_on() -> None:
    progress = LoadProgress(3)
    async with watched(progress) as watching:
        for rank in range(3):
            progress.begin(rank)
        with pytest.raises(AssertionError, match="rank 2 of 3"):
            await goes_on(watching, progress, 0, 1)


async def test_the_first_rank_waits_for_the_others() -> None:
    """They may be slower; once they have ended it is up to the first one again."""
    progress = LoadProgress(2)
    async with watched(progress) as watching:
        for rank in range(2):
            progress.begin(rank)
        await goes_on(watching, progress, 1)
        progress.end(1)
        assert (await told(watching)).startswith("rank 0 of 2")


def test_counts_are_shared_and_apart_from_the_flags() -> None:
    memory = mmap.mmap(-1, memory_bytes(64))
    mine, theirs = (LoadProgress(64, memory) for _ in range(2))
    for rank in range(64):
        mine.begin(rank)
        theirs.advance(rank)
    assert mine.counts == [2] * 64
    flags = memoryview(memory).cast("q")
    assert not any(flags[rank * 8] for rank in range(64))
