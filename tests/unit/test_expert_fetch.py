"""Experts that are read beside the steps, on another thread, for as long as somebody wants them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.waiting import wait_until

from stage_worker.expert_fetch import THREAD_NAME, ExpertFetch
from stagemesh.errors import CheckpointError, InternalError


class Told:
    """What a fetch tells, once."""

    def __init__(self) -> None:
        self.outcomes: list[bool] = []
        self.told = threading.Event()

    def __call__(self, is_fetched: bool) -> None:
        self.outcomes.append(is_fetched)
        self.told.set()

    def outcome(self) -> bool:
        assert self.told.wait(10.0)
        (outcome,) = self.outcomes
        return outcome


class Expert:
    pass


def is_reading() -> bool:
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())


@pytest.fixture
def several_threads() -> Iterator[None]:
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)  # as tests/conftest.py wants it


def test_it_reads_on_a_thread_with_settings_of_its_own(several_threads: None) -> None:
    seen: dict[str, Any] = {}

    def read() -> Iterator[tuple[int, Any]]:
        seen["thread"] = threading.current_thread().name
        seen["num_threads"] = torch.get_num_threads()
        weight = torch.ones(2)
        seen["inference"] = weight.is_inference()
        yield 3, weight
        yield 5, weight

    told = Told()
    fetch = ExpertFetch(read, told)
    assert told.outcome()
    assert sorted(fetch.experts) == [3, 5]
    assert fetch.error is None
    assert seen == {"thread": THREAD_NAME, "num_threads": 1, "inference": True}
    assert torch.get_num_threads() == 3, "steps have as many as before"


@pytest.mark.parametrize(
    ("raised", "error"),
    [(CheckpointError("gone"), CheckpointError), (OSError("input/output error"), InternalError)],
)
def test_a_read_that_fails_keeps_nothing(raised: Exception, error: type[Exception]) -> None:
    def read() -> Iterator[tuple[int, Any]]:
        yield 0, Expert()
        raise raised

    told = Told()
    fetch = ExpertFetch(read, told)
    assert not told.outcome()
    assert fetch.experts == {}
    assert type(fetch.error) is error
    assert str(raised) in str(fetch.error)


def test_what_nobody_wants_any_more_is_not_read_to_its_end() -> None:
    """A read that hangs, of a stage that is gone: once it goes on it ends, and tells nothing."""
    reached, goes_on, closed = threading.Event(), threading.Event(), threading.Event()
    held: list[weakref.ref[Expert]] = []

    def read() -> Iterator[tuple[int, Any]]:
        try:
            for number in range(3):
                expert = Expert()
                held.append(weakref.ref(expert))
                yield number, expert
                del expert
                reached.set()
                assert goes_on.wait(10.0)
        finally:
            closed.set()

    told = Told()
    fetch = ExpertFetch(read, told)
    assert reached.wait(10.0)
    assert fetch.experts == {}, "not before all are there"
    del fetch
    goes_on.set()
    wait_until(lambda: not is_reading(), 10.0, "the thread to end")
    assert closed.is_set()
    assert len(held) == 2
    assert [reference() for reference in held] == [None, None]
    assert told.outcomes == []
