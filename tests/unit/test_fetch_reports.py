"""What ranks say of the experts that they were told to fetch."""

from __future__ import annotations

import mmap

from stage_worker.fetch_reports import FetchReports
from stage_worker.load_watch import LoadProgress
from stage_worker.rank_options import memory_bytes


def test_it_is_fetched_once_every_rank_has_it() -> None:
    reports = FetchReports(3)
    number = reports.begin()
    for rank in range(3):
        assert reports.outcome(number) is None
        reports.tell(rank, number, is_fetched=True)
    assert reports.outcome(number) is True
    assert reports.outcome(reports.begin()) is None, "the next one has another number"


def test_one_that_failed_is_waited_for_by_none_and_waits_for_all() -> None:
    reports = FetchReports(2)
    number = reports.begin()
    reports.tell(0, number, is_fetched=False)
    assert reports.outcome(number) is None, "the other rank still reads"
    reports.tell(1, number, is_fetched=True)
    assert reports.outcome(number) is False


def test_one_that_was_given_up_comes_late() -> None:
    """What it says is neither taken for the next one's, nor in its place."""
    reports = FetchReports(2)
    old, new = reports.begin(), reports.begin()
    for rank in range(2):
        reports.tell(rank, old, is_fetched=True)
    assert reports.outcome(new) is None
    for rank in range(2):
        reports.tell(rank, new, is_fetched=True)
        reports.tell(rank, old, is_fetched=False)
    assert reports.outcome(new) is True


def test_reports_are_shared_and_apart_from_what_else_ranks_share() -> None:
    memory = mmap.mmap(-1, memory_bytes(64))
    first, other = (FetchReports(64, memory) for _ in range(2))
    progress = LoadProgress(64, memory)
    number = first.begin()
    for rank in range(64):
        progress.begin(rank)
        other.tell(rank, number, is_fetched=True)
    assert first.outcome(number) is True
    assert progress.counts == [1] * 64
    flags = memoryview(memory).cast("q")
    assert not any(flags[rank * 8] for rank in range(64))
