"""Real processes that get no further while layers are loaded."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
from support.paths import DEMO_MODEL
from support.stages import NUM_DEMO_LAYERS, WHOLE_DEMO
from support.waiting import wait_until
from support.worker_links import WorkerProcess, link_scheduler, worker_process

from stage_worker.collectives import Group
from stage_worker.load_watch import watch_load
from stage_worker.rank_processes import RankProcesses
from stage_worker.ranked_stage import RankedStage
from stage_worker.server import EXIT_HUNG
from stagemesh.errors import PeerLost


async def test_a_disk_that_does_not_answer_ends_the_worker(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, model, ignore=shutil.ignore_patterns(".*"))
    async with (
        link_scheduler() as scheduler,
        worker_process(model, scheduler.address, "--load-timeout", "500ms") as worker,
    ):
        link = await scheduler.worker()
        (model / "config.json").unlink()
        os.mkfifo(model / "config.json")  # whoever opens it waits for somebody who writes
        link.start_load(0, NUM_DEMO_LAYERS)
        assert await worker.wait() == EXIT_HUNG
        assert "this worker has got no further with its layers" in worker.output()


async def test_a_rank_that_is_stopped_ends_the_worker() -> None:
    options = ("--tensor-parallel", "2", "--load-timeout", "2s")
    async with (
        link_scheduler() as scheduler,
        worker_process(DEMO_MODEL, scheduler.address, *options) as worker,
    ):
        link = await scheduler.worker()
        (rank,) = ranks_of(worker)
        rank.send_signal(signal.SIGSTOP)
        link.start_load(0, NUM_DEMO_LAYERS)
        assert await worker.wait() == EXIT_HUNG
        assert "rank 1 of 2 has got no further with its layers" in worker.output()
        await asyncio.to_thread(wait_until, lambda: not rank.is_running(), 30.0, "its end")


def ranks_of(worker: WorkerProcess) -> list[psutil.Process]:
    return psutil.Process(worker.process.pid).children()


async def test_a_rank_that_is_stopped_in_the_middle_of_its_part() -> None:
    ranks = RankProcesses(2)
    try:
        group = ranks.own.open_group()
        RankedStage.load(
            WHOLE_DEMO, lambda *_: None, ranks, group
        )  # it has started, and torch with it
        loading = asyncio.create_task(asyncio.to_thread(load_until_it_is_stopped, ranks, group))
        watching = asyncio.create_task(watch_load(ranks.load_progress, 1.0))
        async with asyncio.timeout(60):
            assert str(await watching).startswith("rank 1 of 2 has got no further")
        assert ranks.load_progress.counts[1] > 1, "it has read something"
        ranks.kill_processes()
        await asyncio.wait([loading])
        assert isinstance(loading.exception(), PeerLost)
    finally:
        ranks.kill()


def load_until_it_is_stopped(ranks: RankProcesses, group: Group) -> None:
    """Loads on two ranks, again where the other one was done before it could be stopped."""
    progress = ranks.load_progress

    def stop_the_other(*_: int) -> None:
        for _ in range(10_000):
            if progress.counts[1] != 1:
                break
            time.sleep(0.0001)
        os.kill(ranks.pids[0], signal.SIGSTOP)
        if progress.counts[1] == 0:
            os.kill(ranks.pids[0], signal.SIGCONT)

    while True:
        RankedStage.load(WHOLE_DEMO, stop_the_other, ranks, group)
