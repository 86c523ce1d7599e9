"""Hops of a trace on the scheduler's clock, from durations on clocks that agree in nothing."""

from __future__ import annotations

import io
import json
import random
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest

from protos import mesh_pb2, plan_pb2
from stagemesh.cli.trace_file import write_trace
from stagemesh.cli.trace_places import PlacedStep, place

HOP_NS = 200_000
COMPUTE_NS = (5_000_000, 3_000_000)


def traced(num_steps: int, seed: int = 1) -> tuple[list[mesh_pb2.TracedStep], list[list[int]]]:
    """Two stages with two steps under way; also when each step really began at each stage.

    A message takes HOP_NS, and now and then much longer.
    """
    chance = random.Random(seed)
    clocks = (-77_000_000_000, 3_000_000_000)
    free_ns = [0, 0]
    done: list[int] = []
    steps, truth = [], []
    for number in range(num_steps):
        sent_ns = done[number - 2] if number >= 2 else 0
        at_ns, timings, starts = sent_ns, [], []
        for stage in range(2):
            received_ns = at_ns + HOP_NS * chance.choice((1, 1, 1, 8))
            start_ns = max(received_ns, free_ns[stage])
            compute_ns = round(COMPUTE_NS[stage] * chance.uniform(0.8, 1.2))
            free_ns[stage] = start_ns + compute_ns
            at_ns = free_ns[stage] + 100_000
            timings.append(
                plan_pb2.HopTiming(
                    stage=stage,
                    queue_ns=start_ns - received_ns,
                    compute_ns=compute_ns,
                    serialise_ns=100_000,
                    started_ns=start_ns - clocks[0] if stage == 0 else start_ns + clocks[1],
                )
            )
            starts.append(start_ns)
        done.append(at_ns + HOP_NS * chance.choice((1, 1, 1, 8)))
        steps.append(
            mesh_pb2.TracedStep(
                pipeline_id="p",
                epoch=plan_pb2.Epoch(term=1, n=1),
                step=number,
                sent_ns=sent_ns,
                done_ns=done[-1],
                num_rows=1,
                num_tokens=1,
                timings=timings,
            )
        )
        truth.append(starts)
    return steps, truth


def test_hops_are_where_they_were_though_no_clock_was_told() -> None:
    steps, truth = traced(100)
    for placed, starts in zip(place(steps), truth, strict=True):
        for hop, start_ns in zip(placed.hops, starts, strict=True):
            assert hop.start_ns == pytest.approx(start_ns, abs=HOP_NS / 2)


def test_causes_come_before_effects() -> None:
    for placed in place(traced(100)[0]):
        first, second = placed.hops
        assert placed.step.sent_ns <= first.received_ns
        assert first.sent_ns <= second.received_ns
        assert second.sent_ns <= placed.step.done_ns


def test_a_step_without_timings_has_its_own_times_only() -> None:
    (placed,) = place([mesh_pb2.TracedStep(pipeline_id="p", sent_ns=1, done_ns=2)])
    assert placed.hops == ()


def entries(steps: list[PlacedStep]) -> list[dict[str, Any]]:
    rounds = [mesh_pb2.TracedRound(start_ns=5, duration_ns=1000, num_steps=1, num_running=3)]
    file = io.StringIO()
    write_trace(file, steps, rounds, {"p": ["w0", "w1"]})
    found: list[dict[str, Any]] = json.loads(file.getvalue())["traceEvents"]
    return found


def test_the_file_is_what_perfetto_reads() -> None:
    steps = place(traced(50)[0])
    found = entries(steps)
    by_phase = defaultdict(list)
    for entry in found:
        by_phase[entry["ph"]].append(entry)
        if entry["ph"] != "M":
            assert isinstance(entry["ts"], float | int)
    names = {each["args"]["name"] for each in by_phase["M"]}
    assert {"scheduler", "pipeline p", "stage 0 w0", "stage 1 w1", "stage 1 sends"} <= names
    # Slices of one track must not overlap, or a viewer draws one within another.
    tracks = defaultdict(list)
    for entry in by_phase["X"]:
        tracks[entry["pid"], entry["tid"]].append((entry["ts"], entry["ts"] + entry["dur"]))
    for spans in tracks.values():
        for (_, end), (start, _) in pairwise(sorted(spans)):
            assert start >= end - 0.001
    # Every arrow has one beginning and one end, on slices that are there.
    arrows = [(entry["id"], entry["ph"]) for entry in found if entry["ph"] in "sf"]
    assert len(set(arrows)) == len(arrows) == 2 * len(steps)
    starts = {(e["pid"], e["tid"], e["ts"]) for e in by_phase["X"]}
    assert all((e["pid"], e["tid"], e["ts"]) in starts for e in found if e["ph"] in "sf")
    # What is opened is closed.
    assert sorted(e["id"] for e in by_phase["b"]) == sorted(e["id"] for e in by_phase["e"])
    depths = [e["args"]["steps"] for e in by_phase["C"] if e["name"] == "steps in flight"]
    assert max(depths) == 2
    assert min(depths) == depths[-1] == 0
    assert by_phase["C"][0]["args"] == {"waiting": 0, "running": 3}
