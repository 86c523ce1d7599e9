"""What steps cost, learned from steps: rates, and how many steps to have under way."""

from __future__ import annotations

import random

import pytest

from scheduler.core.budgets import CostBudget
from scheduler.core.costs import StageCost, StepRates
from scheduler.core.depth import RoundTrip
from stagemesh.plan import HopTiming

TRUE = StepRates(base=20e6, token=500e3, position=200.0)


def cost_of(chunks: list[tuple[int, int]], rates: StepRates = TRUE) -> int:
    return round(rates.base + sum(rates.tokens(start, end - start) for start, end in chunks))


def observe(cost: StageCost, chunks: list[tuple[int, int]], cost_ns: int) -> None:
    num_positions = sum((end - start) * (start + (end - start + 1) / 2) for start, end in chunks)
    cost.observe(sum(end - start for start, end in chunks), num_positions, cost_ns)


def mixed_step(chance: random.Random) -> list[tuple[int, int]]:
    """Decoding, and now and then a chunk of a prompt."""
    rows = [(n := chance.randrange(2000), n + 1) for _ in range(chance.randrange(1, 20))]
    if chance.random() < 0.3:
        start = chance.randrange(3000)
        rows.append((start, start + chance.randrange(1, 300)))
    return rows


def test_rates_are_found_though_steps_vary_by_a_tenth() -> None:
    chance, cost = random.Random(1), StageCost()
    for _ in range(300):
        chunks = mixed_step(chance)
        observe(cost, chunks, round(cost_of(chunks) * chance.uniform(0.9, 1.1)))
    assert cost.rates.base == pytest.approx(TRUE.base, rel=0.15)
    assert cost.rates.token == pytest.approx(TRUE.token, rel=0.1)
    assert cost.rates.position == pytest.approx(TRUE.position, rel=0.1)


def test_steps_that_are_all_alike_leave_the_rates_near_what_is_usual() -> None:
    cost = StageCost()
    for _ in range(500):
        observe(cost, [(n, n + 1) for n in range(8)], 40_000_000)
    rates = cost.rates
    assert rates.base + rates.tokens(0, 1) * 8 == pytest.approx(40e6, rel=0.02)
    assert rates.base / rates.token == pytest.approx(StepRates().base, rel=0.2)


def test_old_steps_are_forgotten() -> None:
    chance, cost = random.Random(2), StageCost()
    for factor in (10, 1):
        for _ in range(600):
            chunks = mixed_step(chance)
            observe(cost, chunks, factor * cost_of(chunks))
    assert cost.rates.token == pytest.approx(TRUE.token, rel=0.1)


def test_nonsense_makes_no_negative_rates() -> None:
    chance, cost = random.Random(3), StageCost()
    for _ in range(200):
        chunks = mixed_step(chance)
        observe(cost, chunks, round(1e9 / (1 + sum(end - start for start, end in chunks))))
        rates = cost.rates
        assert min(rates.base, rates.position) >= 0
        assert rates.token > 0


@pytest.mark.parametrize("start", [0, 100, 5000])
@pytest.mark.parametrize("rates", [TRUE, StepRates()])
def test_as_many_tokens_as_the_cost_allows(rates: StepRates, start: int) -> None:
    for num in (1, 7, 500):
        cost = rates.tokens(start, num)
        assert rates.num_tokens_for(cost * 1.0001, start) == num
        assert rates.num_tokens_for(cost * 0.9999, start) == num - 1


def test_a_share_is_met_whoever_takes_of_it() -> None:
    rates = StepRates(10.0, 1.0, 0.0)
    share = CostBudget(16.5, rates)
    num_taken = 0
    while share.grant(0, 1):
        share.take(0, 1)
        num_taken += 1
    assert num_taken == 17
    tiny = CostBudget(0.0, rates, least=5.0)
    assert tiny.grant(0, 3) == 3
    assert tiny.grant(0, 100) == 5
    tiny.take(0, 5)
    assert tiny.grant(0, 100) == 0


def far(hops_ns: int, num_stages: int = 2) -> RoundTrip:
    trip = RoundTrip()
    for _ in range(40):
        timings = [HopTiming(stage, queue_ns=5, compute_ns=30) for stage in range(num_stages)]
        trip.observe(timings, num_stages * 35 + hops_ns)
    return trip


def test_as_many_steps_under_way_as_stages_where_messages_are_quick() -> None:
    rates = StepRates(20.0, 1.0, 0.0)
    assert far(2).best_depth(2, rates, 20.0) == 2
    assert far(2, num_stages=5).best_depth(5, rates, 50.0) == 5


def test_more_where_messages_take_longer_than_another_step_costs() -> None:
    trip = far(50)
    assert trip.hops_ns == pytest.approx(50)
    assert trip.num_slowest == pytest.approx(2)
    assert trip.best_depth(2, StepRates(20.0, 1.0, 0.0), 60.0) == 3
    # Smaller steps would not be quicker, since reading the weights is all that they take.
    assert trip.best_depth(2, StepRates(20.0, 0.01, 0.0), 0.6) == 2
