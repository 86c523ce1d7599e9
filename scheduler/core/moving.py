"""Whether a sequence waits for its broken pipeline or begins anew on another one.

Waiting costs what mending has taken lately; moving costs computing prompt and output again behind
what the other pipeline has to do. Short contexts move at once, long ones when it takes longer.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Pipelines

from scheduler.core.admission import AdmissionRound
from scheduler.core.limits import SchedulerLimits
from scheduler.core.pipeline import Pipeline
from scheduler.core.sequence import Sequence

# How often the question is asked again while a pipeline is being mended.
RECONSIDER_NS = 100_000_000
# Of a pipeline that has done next to nothing so far.
_UNKNOWN_REPLAY_NS = 1_000_000_000.0


def move_from(
    broken: Pipeline,
    others: Pipelines[Pipeline],
    limits: SchedulerLimits,
    preempt: Callable[[Sequence], None],
    now_ns: int,
) -> list[Sequence]:
    """Moves what is served sooner elsewhere, and returns it: it runs there already.

    `preempt` makes a sequence wait; it is taken out of the queue by whoever calls.
    """
    assert broken.suspended_ns is not None
    wait_ns = broken.mend_time.remaining_ns(now_ns - broken.suspended_ns)
    moved = []
    for sequence in sorted(broken.running.values(), key=lambda one: one.rank):
        quicker = [
            other
            for other in others
            if _is_roomy(other, sequence)
            and _replay_ns(sequence, other, limits)
            < wait_ns + _rebuild_ns(sequence, broken, limits)
        ]
        admission = AdmissionRound(quicker, sequence.request.priority, limits, preempt)
        if quicker and not sequence.is_probe and admission.could_admit(sequence):
            preempt(sequence)
            if admission.admit(sequence):
                moved.append(sequence)
    return moved


def _is_roomy(other: Pipeline, sequence: Sequence) -> bool:
    """Nobody is moved to where its output must end sooner."""
    assert sequence.pipeline is not None
    capacity = sequence.pipeline.facts.capacity_tokens
    needed = min(sequence.request.total_length, capacity)
    return other.facts.capacity_tokens >= needed


def _replay_ns(sequence: Sequence, other: Pipeline, limits: SchedulerLimits) -> float:
    """Until the next token, if the sequence is computed anew on `other`."""
    num_ahead = sum(other.num_pending(each) for each in other.running.values())
    num_tokens = num_ahead + sequence.num_tokens
    time_ns = other.step_cost.time_for_ns(num_tokens, limits.max_step_tokens)
    return _UNKNOWN_REPLAY_NS if time_ns is None else time_ns


def _rebuild_ns(sequence: Sequence, broken: Pipeline, limits: SchedulerLimits) -> float:
    """Of one stage; what else is to be rebuilt before it is not counted."""
    time_ns = broken.step_cost.time_for_ns(sequence.num_computed, limits.max_step_tokens)
    return 0.0 if time_ns is None else time_ns / broken.facts.num_stages
