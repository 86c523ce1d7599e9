"""Which scheduler counts, and whose fault it is that nobody was heard."""

from __future__ import annotations

import pytest
from support.members import MS, TERM, FakeMesh, S, two_stages

from scheduler.messages import LoadedSpan, Resign
from stagemesh.errors import StaleEpoch
from stagemesh.plan import Epoch, Span


def test_a_scheduler_whose_clock_was_set_back_takes_a_higher_term() -> None:
    mesh = FakeMesh()
    mesh.register("new", span=(0, 3))
    mesh.run()
    loaded = LoadedSpan(Span(3, 6), 100, 16)
    mesh.register("old", loaded=loaded, followed_term=TERM + 20)
    mesh.wait(20 * S)
    assert mesh.members.term == TERM + 21
    assert mesh.serving
    assert mesh.core[mesh.serving[0]].epoch == Epoch(TERM + 21, 1)
    mesh.register("other", followed_term=TERM + 20)
    assert mesh.members.term == TERM + 21


def test_a_scheduler_that_was_replaced_ends() -> None:
    mesh = two_stages()
    with pytest.raises(StaleEpoch, match="was replaced: worker c"):
        mesh.register("c", followed_term=TERM + 1)
    effects = mesh.members.take_effects()
    assert [type(effect) for effect in effects] == [Resign]
    assert [worker.worker_id for worker in mesh.members.workers] == ["a", "b"]


def test_a_worker_that_followed_an_older_scheduler_is_welcome() -> None:
    mesh = two_stages()
    mesh.register("c", followed_term=TERM - 1)
    assert mesh.members.term == TERM


def test_a_scheduler_that_stood_still_blames_nobody() -> None:
    mesh = two_stages()
    mesh.now_ns += 60 * S
    mesh.members.was_deaf(60 * S)
    mesh.run(deaf=["a", "b"])
    assert mesh.serving == ["p0"]
    mesh.wait(1400 * MS, deaf=["b"])
    assert mesh.serving == ["p0"]
    mesh.wait(S, deaf=["b"])
    assert mesh.stages() == ["a", None]
