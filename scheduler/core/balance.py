"""How much one step takes on, so that every step costs the slowest stage about the same.

A pipeline is full only while its steps are alike: behind a step that takes a stage ten times as
long, every other stage waits. So decoding is dealt evenly over the steps under way, and what has to
catch up is spread over many steps, by what it costs rather than by its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from scheduler.core.pipeline import Pipeline
from scheduler.core.sequence import Sequence

# Catching up may make a step so much longer than decoding alone, where as many wait for their first
# token as for their next; by as much more as there are more of them.
_MAX_STRETCH = 0.67
# Where much waits it may be more: all of it in so many steps.
_BACKLOG_STEPS = 32
# Less than this part of a step's base cost is not worth being split off a prompt.
_MIN_PART = 0.25


@dataclass(frozen=True, slots=True)
class Shares:
    """Of one step, in the cost of its tokens; the base cost of a step comes on top. Whoever catches
    up first may take `least`."""

    decoding: float
    catching_up: float
    least: float = 0.0


def share_out(
    pipeline: Pipeline, catching_up: Collection[Sequence], num_waiting_tokens: int
) -> Shares:
    """For the next step of the pipeline. `num_waiting_tokens` are those of the queue."""
    pace, depth = pipeline.pace, pipeline.max_steps_in_flight
    rates = pace.rates
    num_decoding = len(pipeline.running) - len(catching_up)
    num_tokens = pipeline.turns.num_tokens - sum(one.num_tokens for one in catching_up)
    decoding = pace.decode_cost(num_decoding, num_tokens) / depth
    backlog = sum(rates.tokens(*pipeline.pending_span(one)) for one in catching_up)
    if pipeline.lacks:
        # The sooner all is rebuilt, the better; but what a step brought back stays, whatever comes.
        return Shares(decoding, backlog / max(1, pipeline.num_step_slots), rates.base)
    # With fewer steps than may be under way, some stages would have none of it.
    num_steps = depth if num_decoding else min(depth, len(catching_up))
    share = backlog / max(num_steps, _quickest(backlog, rates.base, pipeline.facts.num_stages), 1)
    if num_decoding:
        crowd = max(1.0, len(catching_up) / num_decoding)
        stretch = _MAX_STRETCH * crowd * (rates.base + decoding)
        pressure = (backlog + rates.token * num_waiting_tokens) / _BACKLOG_STEPS
        share = min(share, max(stretch, pressure))
    return Shares(decoding, share, _MIN_PART * rates.base)


def _quickest(backlog: float, base: float, num_stages: int) -> int:
    """In how many steps what has to catch up is done first, with nothing else to do.

    In n steps it is through S stages after (n + S - 1) (base + backlog / n), which is least for
    n^2 = (S - 1) backlog / base.
    """
    return round(math.sqrt((num_stages - 1) * backlog / base)) if min(base, backlog) > 0 else 1
