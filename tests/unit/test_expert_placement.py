"""Placements of experts on ranks: whole, within the room there is, and level."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stage_worker.expert_placement import (
    Placement,
    PlacementBalance,
    Turn,
    first_placement,
    peak,
    place,
    turns,
)

COUNTS = st.lists(st.integers(0, 1000), min_size=4, max_size=24)


def check_whole(placement: Placement, num_experts: int, num_ranks: int, redundant: int) -> None:
    assert len(placement) == num_ranks
    assert {expert for held in placement for expert in held} == set(range(num_experts))
    most = min(num_experts, -(-num_experts // num_ranks) + redundant)
    assert all(len(held) <= most and len(set(held)) == len(held) for held in placement)


@given(COUNTS, st.integers(1, 4), st.integers(0, 6))
def test_every_expert_has_a_place_and_no_rank_more_than_it_has_room_for(
    tokens: list[int], num_ranks: int, redundant: int
) -> None:
    for placement in (
        place(tokens, num_ranks, redundant),
        first_placement(len(tokens), num_ranks, redundant),
    ):
        check_whole(placement, len(tokens), num_ranks, redundant)
        # Of an expert's tokens each is taken by one rank.
        for expert in range(len(tokens)):
            own = [turns(placement, r)[expert] for r in range(num_ranks) if expert in placement[r]]
            assert sorted(turn.first for turn in own) == list(range(own[0].num_holders))


def test_two_experts_that_have_all_tokens() -> None:
    tokens = [0, 60, 0, 0, 0, 40, 0, 0]
    first = first_placement(8, 4, 0)
    assert first == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert peak(first, tokens) == 60
    assert peak(place(tokens, 4, 0), tokens) == 60, "an expert cannot be cut"
    level = place(tokens, 4, 1)
    assert peak(level, tokens) == 30
    assert turns(((0, 1), (1,)), 1) == {1: Turn(1, 2)}


def test_experts_are_moved_where_it_pays_and_left_where_it_does_not() -> None:
    balance = PlacementBalance(4, 2, 0, steps_between=3, min_gain=0.2)
    assert [balance.count_step() for _ in range(6)] == [False, False, True] * 2
    assert balance.change({0: [5, 5, 5, 5], 1: [5, 5, 4, 6]}) is None
    # Experts 0 and 1 of layer 1 are on one rank, and have nearly all that came since.
    change = balance.change({0: [10, 10, 10, 10], 1: [105, 105, 5, 7]})
    assert change is not None
    layer, placement = change
    assert layer == 1
    assert peak(placement, [100, 100, 1, 1]) == 101
    assert balance.change({0: [15, 15, 15, 15], 1: [205, 205, 6, 8]}) == change, "not yet placed"
    balance.placed(layer, placement)
    assert balance.change({0: [20, 20, 20, 20], 1: [305, 305, 7, 9]}) is None


def test_a_layer_that_could_not_be_placed_is_passed_over_for_longer_each_time() -> None:
    """And others come in between."""
    balance = PlacementBalance(4, 2, 0)
    chosen = []

    def look_and_fail() -> None:
        total = 100 * (len(chosen) + 1)
        change = balance.change({0: [total, total, 0, 0], 1: [total, total, total // 9, 0]})
        chosen.append(change[0] if change is not None else None)
        if change is not None:
            balance.failed(change[0])

    for _ in range(20):
        look_and_fail()
    assert chosen[:4] == [0, 1, None, 0]
    assert [look for look, layer in enumerate(chosen, 1) if layer == 0] == [1, 4, 9, 18]
    balance.placed(0, ((0, 1), (2, 3)))  # what failed before counts no more
    balance.failed(0)
    for _ in range(3):
        look_and_fail()
    assert [layer == 0 for layer in chosen[20:]] == [False, False, True]
