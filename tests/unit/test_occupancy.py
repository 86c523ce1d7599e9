"""What a worker's time is counted for: each moment once, and nothing is lost."""

from __future__ import annotations

from stage_worker.occupancy import Doing, Occupancy


class Clock:
    def __init__(self) -> None:
        self.now_ns = 1000

    def __call__(self) -> int:
        return self.now_ns


def spent(occupancy: Occupancy) -> tuple[int, int, int, int]:
    times = occupancy.spent_ns()
    return (
        times[Doing.COMPUTING],
        times[Doing.WRITING],
        times[Doing.SERIALISING],
        times[Doing.WAITING],
    )


def test_a_step_from_its_coming_to_its_leaving() -> None:
    clock = Clock()
    occupancy = Occupancy(clock)
    clock.now_ns += 7  # in no epoch
    seat = occupancy.join()
    clock.now_ns += 10
    with seat.computing():
        clock.now_ns += 100
    clock.now_ns += 3
    seat.writing()
    clock.now_ns += 20
    seat.written()
    seat.sent()
    clock.now_ns += 5
    assert spent(occupancy) == (100, 20, 3, 15)


def test_what_goes_on_beside_computing_costs_nothing() -> None:
    clock = Clock()
    occupancy = Occupancy(clock)
    seat = occupancy.join()
    with seat.computing():
        clock.now_ns += 10
    with seat.computing():
        seat.writing()
        clock.now_ns += 50
        seat.written()
        seat.sent()
    clock.now_ns += 1  # the second output is still to be sent
    seat.writing()
    seat.written()
    seat.sent()
    clock.now_ns += 2
    assert spent(occupancy) == (60, 0, 1, 2)


def test_an_epoch_that_ends_takes_what_was_under_way_with_it() -> None:
    clock = Clock()
    occupancy = Occupancy(clock)
    old = occupancy.join()
    with old.computing():
        old.writing()
    clock.now_ns += 10
    old.leave()
    clock.now_ns += 1000  # in no epoch
    new = occupancy.join()
    clock.now_ns += 10
    new.leave()
    assert spent(occupancy) == (0, 10, 0, 10)


def test_two_epochs_at_a_time_share_one_device() -> None:
    clock = Clock()
    occupancy = Occupancy(clock)
    first, second = occupancy.join(), occupancy.join()
    with first.computing():
        clock.now_ns += 10
        second.leave()
        clock.now_ns += 10
    assert spent(occupancy) == (20, 0, 0, 0)
