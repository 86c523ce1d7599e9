"""What each stage's time went to, as a bar: how full a pipeline is, at one look.

Between two answers of the scheduler, or since the workers started where there is only one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from protos import mesh_pb2

_MIN_BAR = 10
_MAX_BAR = 60


@dataclass(frozen=True, slots=True)
class Part:
    """A share of a bar. It has a character of its own, since not all terminals have colours."""

    name: str
    short: str
    character: str
    style: str


PARTS = (
    Part("busy", "busy", "█", "green"),
    Part("serialising", "ser", "▓", "cyan"),
    Part("waits for output", "out", "▒", "yellow"),
    Part("waits for input", "in", "░", "red"),
    Part("nothing scheduled", "idle", "·", "dim"),
)


@dataclass(frozen=True, slots=True)
class StageTime:
    """Of one stage: nanoseconds for each of PARTS."""

    stage: int
    worker_id: str
    parts_ns: tuple[int, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        whole_ns = sum(self.parts_ns)
        return tuple(ns / whole_ns if whole_ns else 0.0 for ns in self.parts_ns)


class StageBars:
    """A line for each stage, as wide as the terminal allows, and one that tells what is what."""

    def __init__(self, times: Iterable[StageTime]) -> None:
        self._times = tuple(times)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = [f"{time.stage} {time.worker_id}" for time in self._times]
        # A name of its own has at most a third of the line.
        name_width = min(max(map(len, names), default=0), options.max_width // 3)
        width = options.max_width - name_width - len("  100 % busy")
        width = max(_MIN_BAR, min(_MAX_BAR, width))
        for name, time in zip(names, self._times, strict=True):
            line = Text(f"{name[:name_width]:{name_width}} ", no_wrap=True)
            line.append_text(bar(time.shares, width))
            line.append(f" {100 * time.shares[0]:3.0f} % busy")
            yield line
        yield _legend(options.max_width)


def bar(shares: Iterable[float], width: int) -> Text:
    """Parts are rounded so that together they are `width` wide."""
    text = Text()
    end, drawn = 0.0, 0
    for part, share in zip(PARTS, shares, strict=True):
        end += share
        upto = round(end * width)
        text.append(part.character * (upto - drawn), part.style)
        drawn = upto
    text.append(" " * (width - drawn))
    return text


def stage_times(
    pipeline: mesh_pb2.PipelineStatus,
    status: mesh_pb2.GetStatusResponse,
    before: mesh_pb2.GetStatusResponse | None,
) -> list[StageTime]:
    """Of the stages that somebody holds."""
    workers = {worker.worker_id: worker for worker in status.workers}
    earlier = {worker.worker_id: worker for worker in before.workers} if before else {}
    unscheduled_ns = pipeline.unscheduled_ns - _unscheduled_before_ns(pipeline, before)
    return [
        StageTime(
            stage, worker_id, _parts(workers[worker_id], earlier.get(worker_id), unscheduled_ns)
        )
        for stage, worker_id in enumerate(pipeline.worker_ids)
        if worker_id in workers
    ]


def _unscheduled_before_ns(
    pipeline: mesh_pb2.PipelineStatus, before: mesh_pb2.GetStatusResponse | None
) -> int:
    same = [p for p in before.pipelines if p.pipeline_id == pipeline.pipeline_id] if before else []
    return same[0].unscheduled_ns if same else 0


def _parts(
    worker: mesh_pb2.WorkerStatus, before: mesh_pb2.WorkerStatus | None, unscheduled_ns: int
) -> tuple[int, ...]:
    """Waiting for input while nothing was under way is no bubble, and shown apart."""
    stats = worker.stats
    same = before is not None and before.incarnation == worker.incarnation
    old = before.stats if before is not None and same else mesh_pb2.WorkerStats()
    input_ns = stats.input_wait_ns - old.input_wait_ns
    unscheduled_ns = max(0, min(unscheduled_ns, input_ns))
    return (
        stats.busy_ns - old.busy_ns,
        stats.serialise_ns - old.serialise_ns,
        stats.output_wait_ns - old.output_wait_ns,
        input_ns - unscheduled_ns,
        unscheduled_ns,
    )


def _legend(width: int) -> Text:
    """In short words where there is no room for long ones."""
    long = "  ".join(f"{part.character} {part.name}" for part in PARTS)
    text = Text(no_wrap=True, overflow="ellipsis")
    for index, part in enumerate(PARTS):
        text.append("  " if index else "")
        text.append(part.character, part.style)
        text.append(f" {part.name if len(long) <= width else part.short}", "dim")
    return text
