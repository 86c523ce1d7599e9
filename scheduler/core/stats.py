"""What the core can say about itself for people and dashboards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.core.pipeline import Pipeline
from scheduler.core.roster import Roster
from stagemesh.plan import Epoch, HopTiming


@dataclass(frozen=True, slots=True)
class PipelineStats:
    """`num_free_blocks` includes `num_cached_blocks`. `mean_timings`: one per stage, over the last
    steps. `num_lacking_tokens` counts what is still to be rebuilt, once per stage and block that
    lacks it; `num_tokens_rebuilt` what has been since the epoch began, once per row. For
    `unscheduled_ns` it served without a step under way."""

    pipeline_id: str
    epoch: Epoch
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_running: int
    steps_in_flight: int
    steps_done: int
    num_lacking_tokens: int
    num_tokens_rebuilt: int
    mean_timings: tuple[HopTiming, ...]
    unscheduled_ns: int
    max_steps_in_flight: int


@dataclass(frozen=True, slots=True)
class CoreStats:
    """Totals count since the core began. Every accepted request is waiting, running, finished (by
    itself), aborted or failed. Prompt tokens count when a request is first admitted."""

    num_waiting: int
    num_running: int
    num_accepted: int
    num_finished: int
    num_refused: int
    num_aborted: int
    num_failed: int
    num_preempted: int
    generated_tokens: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens_per_s: float
    prompt_tokens_per_s: float
    pipelines: tuple[PipelineStats, ...]


def core_stats(roster: Roster, pipelines: Iterable[Pipeline], now_ns: int) -> CoreStats:
    counters = roster.counters
    return CoreStats(
        num_waiting=len(roster.queue),
        num_running=len(roster.live) - len(roster.queue),
        num_accepted=counters.num_accepted,
        num_finished=counters.num_finished,
        num_refused=counters.num_refused,
        num_aborted=counters.num_aborted,
        num_failed=counters.num_failed,
        num_preempted=counters.num_preempted,
        generated_tokens=counters.generated_tokens,
        prompt_tokens=counters.prompt_tokens,
        cached_prompt_tokens=counters.cached_prompt_tokens,
        generated_tokens_per_s=counters.generated_rate.per_second(now_ns),
        prompt_tokens_per_s=counters.prompt_rate.per_second(now_ns),
        pipelines=tuple(pipeline_stats(pipeline, now_ns) for pipeline in pipelines),
    )


def pipeline_stats(pipeline: Pipeline, now_ns: int) -> PipelineStats:
    return PipelineStats(
        pipeline_id=pipeline.pipeline_id,
        epoch=pipeline.epoch,
        num_blocks=pipeline.pool.num_blocks,
        num_free_blocks=pipeline.pool.num_free,
        num_cached_blocks=pipeline.pool.num_cached,
        num_running=len(pipeline.running),
        steps_in_flight=len(pipeline.in_flight),
        steps_done=pipeline.num_steps_done,
        num_lacking_tokens=pipeline.lacks.num_tokens,
        num_tokens_rebuilt=pipeline.num_tokens_rebuilt,
        mean_timings=_mean_timings(pipeline.recent_timings),
        unscheduled_ns=pipeline.unscheduled.total_ns(now_ns),
        max_steps_in_flight=pipeline.max_steps_in_flight,
    )


def _mean_timings(steps: Iterable[tuple[HopTiming, ...]]) -> tuple[HopTiming, ...]:
    by_stage: dict[int, list[HopTiming]] = {}
    for timings in steps:
        for timing in timings:
            by_stage.setdefault(timing.stage, []).append(timing)
    return tuple(_mean(stage, timings) for stage, timings in sorted(by_stage.items()))


def _mean(stage: int, timings: list[HopTiming]) -> HopTiming:
    num = len(timings)
    return HopTiming(
        stage=stage,
        receive_ns=sum(timing.receive_ns for timing in timings) // num,
        queue_ns=sum(timing.queue_ns for timing in timings) // num,
        compute_ns=sum(timing.compute_ns for timing in timings) // num,
        serialise_ns=sum(timing.serialise_ns for timing in timings) // num,
        idle_ns=sum(timing.idle_ns for timing in timings) // num,
        received_bytes=sum(timing.received_bytes for timing in timings) // num,
    )
