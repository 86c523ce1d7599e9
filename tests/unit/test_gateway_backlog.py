"""What is to be submitted: oldest first, whoever came back where its age puts it."""

from __future__ import annotations

from gateway.backlog import Backlog
from gateway.held_request import HeldRequest, Submission
from stagemesh.sampling import SamplingSpec


class NoOwner:
    def release(self, held: HeldRequest) -> None:
        raise AssertionError


def held(number: int) -> HeldRequest:
    return HeldRequest(number, Submission("", "", (5,), SamplingSpec(), 1), NoOwner())


async def test_the_oldest_comes_first_and_once() -> None:
    backlog = Backlog()
    first, second, third, fourth = (held(number) for number in range(4))
    for each in (third, first, fourth, first, second, third):
        backlog.add(each)
    assert len(backlog) == 4
    assert backlog.pop() is first
    backlog.discard(third)
    backlog.discard(third)
    backlog.add(first)
    assert [backlog.pop() for _ in range(4)] == [first, second, fourth, None]


async def test_another_request_of_the_same_age_is_not_meant() -> None:
    backlog = Backlog()
    backlog.add(mine := held(3))
    backlog.discard(held(3))
    backlog.discard(held(9))
    assert backlog.pop() is mine
