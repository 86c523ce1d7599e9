"""When a request that comes now would get its first token, by measured rates.

A request whose deadline cannot be met is better refused than queued: it would take the place of
one that can.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.core.pipeline import Pipeline
from scheduler.core.queue import WaitingQueue
from scheduler.core.request import Request
from stagemesh.errors import QueueFull

_MIN_RETRY_S = 0.1


def check_deadline(
    request: Request,
    queue: WaitingQueue,
    pipelines: Iterable[Pipeline],
    max_step_tokens: int,
    now_ns: int,
) -> None:
    """Raises QueueFull where even the first token would come too late."""
    if request.deadline_ns is None:
        return
    wait_ns = _first_token_ns(request, queue, pipelines, max_step_tokens)
    remaining_ns = request.deadline_ns - now_ns
    if wait_ns is not None and wait_ns > remaining_ns:
        raise QueueFull(
            f"the first token would take about {wait_ns / 1e9:.1f} s, the deadline leaves "
            f"{max(0, remaining_ns) / 1e9:.1f} s",
            retry_after_s=max(_MIN_RETRY_S, (wait_ns - remaining_ns) / 1e9),
        )


def _first_token_ns(
    request: Request, queue: WaitingQueue, pipelines: Iterable[Pipeline], max_step_tokens: int
) -> float | None:
    """Nanoseconds from now on; None while no pipeline serves or too little was measured.

    Counts what waits before the request and what running ones have to catch up; never more than
    that, so that nothing is refused that might have been in time.
    """
    serving = [pipeline for pipeline in pipelines if not pipeline.is_suspended]
    tokens_per_ns = 0.0
    for pipeline in serving:
        time_ns = pipeline.step_cost.time_for_ns(max_step_tokens, max_step_tokens)
        if time_ns is None or time_ns <= 0:
            return None
        tokens_per_ns += max_step_tokens / time_ns
    if not serving:
        return None
    num_tokens = len(request.prompt_token_ids)
    num_tokens += sum(
        each.num_tokens for each in queue if each.request.priority <= request.priority
    )
    num_tokens += sum(
        pipeline.num_pending(each) for pipeline in serving for each in pipeline.running.values()
    )
    return num_tokens / tokens_per_ns
