"""Threads of a step, and how many `stagemesh up` gives its workers."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from stage_worker import thread_counts
from stage_worker.options import WorkerOptions
from stage_worker.thread_counts import ThreadCounts
from stagemesh.cli import up_options
from stagemesh.cli.up_options import UpOptions
from stagemesh.errors import ConfigError
from stagemesh.plan import Epoch, Step


def numbers_of(alone: int) -> list[int]:
    """Of a step like others, of one that is alone, and of the next like others."""
    found: list[int] = []

    def work() -> None:
        counts = ThreadCounts(alone)
        for is_alone in (False, True, False):
            counts.set_for(Step("p", Epoch(1, 1), 0, (), (), is_alone))
            found.append(torch.get_num_threads())

    thread = threading.Thread(target=work)  # the numbers are a thread's own
    thread.start()
    thread.join()
    return found


def test_a_step_that_is_alone_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_counts, "_USUAL", 1)
    assert numbers_of(3) == [1, 3, 1]
    assert numbers_of(0) == [1, 1, 1]


def test_up_gives_a_lone_step_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up_options, "num_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def numbers(options: UpOptions) -> tuple[int, int]:
        return options.threads(), options.threads_when_alone()

    assert numbers(UpOptions(stages=4)) == (2, 8)
    assert numbers(UpOptions(stages=2, replicas=2)) == (2, 4)
    assert numbers(UpOptions(stages=4, batch_invariant=True)) == (2, 0)
    assert numbers(UpOptions(stages=4, threads_per_stage=3)) == (3, 0)
    assert numbers(UpOptions(stages=4, threads_per_stage=3, lone_threads=6)) == (3, 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert numbers(UpOptions(stages=4)) == (1, 0)


def test_lone_threads_and_batch_invariance_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="lone-threads"):
        WorkerOptions(model=Path("m"), lone_threads=2, batch_invariant=True)
