"""Stages are lost and come back: what is computed again is said beforehand, and no more than that.

Every world also holds its streams against their right answers.
"""

from __future__ import annotations

from dataclasses import replace

from simulation.clock import MS
from simulation.examples import arrival, mesh, shape
from simulation.scenario import Break, Scenario
from simulation.world import World

NUM_PROMPT = 40
# Long enough into the stream that the prompt is computed, long before its end.
LOSS_NS = 60 * MS
# Steps in flight when the epoch ends are done again.
IN_FLIGHT = 3

STORY = arrival(0, num_prompt=NUM_PROMPT, max_tokens=40)


def executed(scenario: Scenario) -> list[int]:
    """Tokens by stage, of the workers that are there in the end."""
    world = World(0, scenario=scenario).run()
    assert world.core.stats().num_finished == len(scenario.arrivals)
    return world.pipelines["p0"].num_tokens_executed


def test_only_the_lost_stage_computes_anew_from_what_was_logged() -> None:
    calm = mesh(shape(3), arrivals=(STORY,))
    first, middle, last = executed(replace(calm, breaks=(Break(LOSS_NS, lost=(1,)),)))
    undisturbed = executed(calm)[0]
    assert undisturbed == NUM_PROMPT + 39
    assert undisturbed <= first <= undisturbed + IN_FLIGHT
    assert undisturbed <= last <= undisturbed + IN_FLIGHT
    assert undisturbed <= middle <= undisturbed + IN_FLIGHT  # all that the new one ever did


def test_without_a_log_the_stages_before_compute_once_more_and_those_behind_do_not() -> None:
    short = replace(shape(3), log_blocks=(0, 0))
    calm = mesh(short, arrivals=(STORY,))
    first, _, last = executed(replace(calm, breaks=(Break(LOSS_NS, lost=(1,)),)))
    undisturbed = executed(calm)[0]
    assert first >= undisturbed + NUM_PROMPT
    assert last <= undisturbed + IN_FLIGHT


def test_a_log_that_ends_in_the_middle_is_used_as_far_as_it_goes() -> None:
    half = replace(shape(3), log_blocks=(5, 5))  # 20 of 40 positions
    calm = mesh(half, arrivals=(STORY,))
    first, _, last = executed(replace(calm, breaks=(Break(LOSS_NS, lost=(1,)),)))
    undisturbed = executed(calm)[0]
    assert undisturbed + NUM_PROMPT - 20 <= first < undisturbed + NUM_PROMPT
    assert last <= undisturbed + IN_FLIGHT


def test_what_several_share_is_rebuilt_once() -> None:
    sharers = tuple(
        replace(each, request=replace(each.request, prompt_token_ids=(7,) * 40 + (number,)))
        for number in range(6)
        for each in [arrival(number, num_prompt=1, max_tokens=40, at_ns=number * 4 * MS)]
    )
    calm = mesh(shape(3), arrivals=sharers)
    loss = Break(LOSS_NS, lost=(1,))
    _, middle, last = executed(replace(calm, breaks=(loss,)))
    generated = 6 * 40
    assert last < generated + 3 * 41  # the prompt was shared to begin with
    assert middle < generated + 41 + 6 * 5


def test_pages_that_move_need_no_computing() -> None:
    calm = mesh(shape(3), arrivals=(STORY,))
    first, middle, last = executed(replace(calm, breaks=(Break(LOSS_NS, moved=(1,)),)))
    undisturbed = executed(calm)[0]
    assert middle < 40
    assert max(first, last) <= undisturbed + IN_FLIGHT


def test_all_stages_lost_one_after_another_and_two_at_once() -> None:
    breaks = tuple(Break(20 * MS * n, lost=(n % 4, (n * n) % 4)) for n in range(1, 12))
    arrivals = tuple(arrival(number, num_prompt=30, max_tokens=30) for number in range(5))
    world = World(0, scenario=replace(mesh(shape(4), arrivals=arrivals), breaks=breaks)).run()
    assert world.pipelines["p0"].num_losses > 10


def test_lost_again_while_it_is_being_rebuilt() -> None:
    arrivals = tuple(arrival(number, num_prompt=60, max_tokens=20) for number in range(3))
    calm = mesh(shape(3), arrivals=arrivals, max_step_tokens=8)
    # Rebuilding takes more than 20 steps of at least a millisecond.
    breaks = tuple(Break(LOSS_NS + 12 * MS * n, lost=(1,), away_ns=MS) for n in range(5))
    executed(replace(calm, breaks=breaks))


def test_a_spare_with_less_memory_preempts_what_no_longer_fits() -> None:
    arrivals = tuple(arrival(number, num_prompt=20, max_tokens=30) for number in range(6))
    calm = mesh(shape(3, num_blocks=96), arrivals=arrivals)
    breaks = (Break(LOSS_NS, lost=(2,), num_blocks=20), Break(2 * LOSS_NS, lost=(2,)))
    world = World(0, scenario=replace(calm, breaks=breaks)).run()
    stats = world.core.stats()
    assert stats.num_finished == 6
    assert stats.num_preempted > 0
    assert stats.pipelines[0].num_blocks == 96
