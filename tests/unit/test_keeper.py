"""How long a process rests before it is started again."""

from __future__ import annotations

from itertools import pairwise

from stagemesh.cli.keeper import FIRST_PAUSE_S, LONG_LIFE_S, MAX_PAUSE_S, RestartPause


def test_the_pause_grows_with_every_short_life_up_to_a_limit() -> None:
    pause = RestartPause()
    pauses = [pause.after(0.0) for _ in range(12)]
    assert pauses[0] == FIRST_PAUSE_S
    assert all(later == min(MAX_PAUSE_S, 2 * one) for one, later in pairwise(pauses))
    assert pauses[-1] == MAX_PAUSE_S


def test_a_long_life_is_no_reason_to_wait() -> None:
    pause = RestartPause()
    for _ in range(5):
        pause.after(0.0)
    assert pause.after(LONG_LIFE_S) == FIRST_PAUSE_S
    assert pause.after(0.0) == 2 * FIRST_PAUSE_S
