"""The bars of `stagemesh status`: shares of the time between two answers, in any width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from protos import mesh_pb2
from stagemesh.cli.stage_bars import StageBars, bar, stage_times


def answer(seconds: float, *, incarnation: int = 1) -> mesh_pb2.GetStatusResponse:
    """Of a mesh whose one stage is busy for half of its time, and unscheduled for a quarter."""
    ns = round(seconds * 1e9)
    stats = mesh_pb2.WorkerStats(
        busy_ns=ns // 2, serialise_ns=ns // 16, output_wait_ns=ns // 16, input_wait_ns=3 * ns // 8
    )
    worker = mesh_pb2.WorkerStatus(worker_id="w0", incarnation=incarnation, stats=stats)
    pipeline = mesh_pb2.PipelineStatus(
        pipeline_id="p", worker_ids=["w0", ""], unscheduled_ns=ns // 4
    )
    return mesh_pb2.GetStatusResponse(workers=[worker], pipelines=[pipeline])


def test_shares_are_of_the_time_between_two_answers() -> None:
    now, before = answer(30.0), answer(10.0)
    (time,) = stage_times(now.pipelines[0], now, before)
    assert sum(time.parts_ns) == 20e9
    assert time.shares == pytest.approx((0.5, 1 / 16, 1 / 16, 1 / 8, 1 / 4))


def test_a_worker_that_was_started_again_counts_from_its_start() -> None:
    now = answer(10.0, incarnation=2)
    (time,) = stage_times(now.pipelines[0], now, answer(20.0))
    assert time.parts_ns[0] == 5e9


def test_parts_fill_the_bar_however_they_are_rounded() -> None:
    for width in (1, 7, 10, 33):
        assert len(bar((1 / 3, 1 / 3, 0.0, 0.0, 1 / 3), width).plain) == width
    assert bar((0.5, 0.0, 0.0, 0.25, 0.25), 8).plain == "████░░··"
    assert bar((0.0,) * 5, 4).plain == "    "


@pytest.mark.parametrize("width", [40, 80, 200])
def test_lines_fit_the_terminal(width: int) -> None:
    now = answer(4.0)
    console = Console(file=io.StringIO(), width=width)
    console.print(StageBars(stage_times(now.pipelines[0], now, None)))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2, "one stage and the legend"
    assert max(map(len, lines)) <= width
    assert "50 % busy" in lines[0]
