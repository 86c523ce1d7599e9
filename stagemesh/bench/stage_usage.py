"""How busy each stage was between two looks at a mesh, and what it sent: from GetStatus.

Workers count since they started and report with their heartbeats, so all of a worker's numbers are
of one moment, but not of the moment of the look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from protos import mesh_pb2

Status = mesh_pb2.GetStatusResponse
StatsPair = tuple[mesh_pb2.WorkerStats, mesh_pb2.WorkerStats]

# Waiting for input while no step was under way at all: nobody wanted anything, which is no bubble.
UNSCHEDULED = "unscheduled"

# Between two looks a worker must have counted this much time for its shares to mean something.
MIN_COUNTED_NS = 10**9


@dataclass(frozen=True, slots=True)
class StageUsage:
    """One stage's worker. `shares` of its time, by what it did; they add up to 1."""

    pipeline: str
    stage: int
    worker: str
    shares: Mapping[str, float]
    num_steps: int
    rows_per_step: float
    compute_ms_per_step: float
    bytes_sent: int
    messages_sent: int

    @property
    def busy_share(self) -> float:
        return self.shares.get("busy", 0.0)

    @property
    def bubble_share(self) -> float:
        """What it had to wait for, or did beside computing, while steps were under way."""
        return math.fsum(
            share for state, share in self.shares.items() if state not in ("busy", UNSCHEDULED)
        )


def state_times_ns(stats: mesh_pb2.WorkerStats) -> dict[str, int]:
    """What a worker's time in epochs went to since it started, which each moment is part of."""
    return {
        "busy": stats.busy_ns,
        "serialise": stats.serialise_ns,
        "output wait": stats.output_wait_ns,
        "input wait": stats.input_wait_ns,
    }


def stage_usage(before: Status, after: Status, steady: tuple[Status, Status]) -> list[StageUsage]:
    """One entry per stage of each pipeline, for workers that were there all the time.

    Counts are of [before, after]; shares of `steady`, two looks while the load was on.
    """
    found = []
    for pipeline in after.pipelines:
        for stage, name in enumerate(pipeline.worker_ids):
            run = _stats_of(name, before, after)
            loaded = _stats_of(name, *steady)
            if run is not None and loaded is not None:
                shares = _shares(*loaded, _unscheduled_ns(pipeline.pipeline_id, *steady))
                found.append(_usage(pipeline.pipeline_id, stage, name, run, shares))
    return found


def _unscheduled_ns(pipeline_id: str, first: Status, last: Status) -> int:
    """For how long nothing was under way in the pipeline, which its scheduler knows."""
    times = [
        pipeline.unscheduled_ns
        for status in (first, last)
        for pipeline in status.pipelines
        if pipeline.pipeline_id == pipeline_id
    ]
    return times[1] - times[0] if len(times) == 2 else 0


def _workers(status: Status) -> dict[str, mesh_pb2.WorkerStatus]:
    return {worker.worker_id: worker for worker in status.workers}


def _stats_of(name: str, first: Status, last: Status) -> StatsPair | None:
    """None where it was not there both times, or was started again meanwhile: it counts from 0."""
    earlier, later = _workers(first).get(name), _workers(last).get(name)
    if earlier is None or later is None or earlier.incarnation != later.incarnation:
        return None
    return earlier.stats, later.stats


def _usage(
    pipeline: str, stage: int, worker: str, run: StatsPair, shares: Mapping[str, float]
) -> StageUsage:
    first, last = run
    num_steps = last.steps_executed - first.steps_executed
    steps = max(1, num_steps)
    return StageUsage(
        pipeline=pipeline,
        stage=stage,
        worker=worker,
        shares=shares,
        num_steps=num_steps,
        rows_per_step=(last.rows_executed - first.rows_executed) / steps,
        compute_ms_per_step=(last.compute_ns - first.compute_ns) / steps / 1e6,
        bytes_sent=last.bytes_sent - first.bytes_sent,
        messages_sent=last.messages_sent - first.messages_sent,
    )


def _shares(
    first: mesh_pb2.WorkerStats, last: mesh_pb2.WorkerStats, unscheduled_ns: int
) -> dict[str, float]:
    start, end = state_times_ns(first), state_times_ns(last)
    times_ns = {state: end[state] - start[state] for state in end}
    total_ns = sum(times_ns.values())
    times_ns[UNSCHEDULED] = max(0, min(unscheduled_ns, times_ns["input wait"]))
    times_ns["input wait"] -= times_ns[UNSCHEDULED]
    return {state: ns / total_ns if total_ns else 0.0 for state, ns in times_ns.items()}


def steady_pair(before: Status, during: Sequence[Status], after: Status) -> tuple[Status, Status]:
    """Two looks for the shares: the first and the last that saw the load, so that neither the idle
    time before it nor the workers' delay in reporting counts. (before, after) where the run was too
    short for that."""
    began = [look for look in during if _have_stepped(before, look)]
    if len(began) >= 2 and _counted_ns(began[0], began[-1]) >= MIN_COUNTED_NS:
        return began[0], began[-1]
    return before, after


def _have_stepped(before: Status, look: Status) -> bool:
    """Whether every worker that takes part has reported a step since."""
    earlier = _workers(before)
    taking_part = {name for pipeline in look.pipelines for name in pipeline.worker_ids}
    return all(
        name in earlier and worker.stats.steps_executed > earlier[name].stats.steps_executed
        for name, worker in _workers(look).items()
        if name in taking_part
    )


def _counted_ns(first: Status, last: Status) -> int:
    """The least that a worker has counted between the two."""
    start, end = _workers(first), _workers(last)
    times = [
        sum(state_times_ns(end[name].stats).values()) - sum(state_times_ns(worker.stats).values())
        for name, worker in start.items()
        if name in end and worker.stats.steps_executed
    ]
    return min(times, default=0)


def has_caught_up(before: Status, now: Status) -> bool:
    """Whether every worker has reported all steps that the scheduler saw done since `before`."""
    done = {pipeline.pipeline_id: pipeline.steps_done for pipeline in before.pipelines}
    earlier = _workers(before)
    wanted: dict[str, int] = {}
    for pipeline in now.pipelines:
        steps = pipeline.steps_done - done.get(pipeline.pipeline_id, 0)
        for name in pipeline.worker_ids:
            wanted[name] = wanted.get(name, 0) + steps
    return all(
        worker.stats.steps_executed - earlier[worker.worker_id].stats.steps_executed
        >= wanted.get(worker.worker_id, 0)
        for worker in now.workers
        if worker.worker_id in earlier
    )
