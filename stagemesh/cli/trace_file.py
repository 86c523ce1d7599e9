"""A trace as a file for Perfetto (ui.perfetto.dev) or chrome://tracing, in their JSON.

A process per pipeline, in it a track for what each stage's device computes and one for what it
sends, and arrows that follow a step. What overlaps itself is asynchronous, as the format has it:
steps from the scheduler and back, and steps that are received by a stage or wait for its device.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from protos import mesh_pb2
from stagemesh.cli.trace_places import PlacedHop, PlacedStep

_SCHEDULER = 1  # number of a process in the file
_ROUNDS = 1  # number of a track
_Entry = dict[str, Any]


def write_trace(
    file: TextIO,
    steps: Sequence[PlacedStep],
    rounds: Sequence[mesh_pb2.TracedRound],
    workers: dict[str, Sequence[str]],
) -> None:
    """`workers`: ids of the stages' workers by pipeline."""
    file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
    for index, entry in enumerate(_entries(steps, rounds, workers)):
        file.write(("" if index == 0 else ",\n") + json.dumps(entry, separators=(",", ":")))
    file.write("\n]}\n")


def _entries(
    steps: Sequence[PlacedStep],
    rounds: Sequence[mesh_pb2.TracedRound],
    workers: dict[str, Sequence[str]],
) -> Iterator[_Entry]:
    yield _name("process_name", _SCHEDULER, 0, "scheduler")
    yield _name("thread_name", _SCHEDULER, _ROUNDS, "rounds of planning")
    for each in rounds:
        yield from _round(each)
    pipelines = sorted({placed.step.pipeline_id for placed in steps} | set(workers))
    for number, pipeline_id in enumerate(pipelines, _SCHEDULER + 1):
        own = [placed for placed in steps if placed.step.pipeline_id == pipeline_id]
        yield from _pipeline(number, pipeline_id, own, workers.get(pipeline_id, ()))


def _round(each: mesh_pb2.TracedRound) -> Iterator[_Entry]:
    args = {"steps": each.num_steps}
    start_ns, end_ns = each.start_ns, each.start_ns + each.duration_ns
    yield _slice("round", _SCHEDULER, _ROUNDS, start_ns, end_ns, args)
    requests = {"waiting": each.num_waiting, "running": each.num_running}
    yield _counter("requests", _SCHEDULER, each.start_ns, requests)


def _pipeline(
    number: int, pipeline_id: str, steps: Sequence[PlacedStep], worker_ids: Sequence[str]
) -> Iterator[_Entry]:
    yield _name("process_name", number, 0, f"pipeline {pipeline_id}")
    num_stages = max([len(worker_ids), *(len(placed.hops) for placed in steps)])
    for stage in range(num_stages):
        worker = f" {worker_ids[stage]}" if stage < len(worker_ids) else ""
        yield _name("thread_name", number, _device(stage), f"stage {stage}{worker}")
        yield _name("thread_name", number, _sender(stage), f"stage {stage} sends")
    for placed in steps:
        yield from _step(number, placed)
    changes = [(p.step.sent_ns, p.step.done_ns) for p in steps]
    yield from _depths("steps in flight", number, changes)
    for stage in range(num_stages):
        hops = [placed.hops[stage] for placed in steps if stage < len(placed.hops)]
        waits = [(hop.received_ns, hop.start_ns) for hop in hops]
        yield from _depths(f"stage {stage} queue", number, waits)


def _step(number: int, placed: PlacedStep) -> Iterator[_Entry]:
    """The whole step is an asynchronous slice: several are under way at a time."""
    step = placed.step
    name = f"step {step.step}"
    flow = f"{number}.{step.epoch.n}.{step.step}"
    args = {"rows": step.num_rows, "tokens": step.num_tokens, "epoch": step.epoch.n}
    yield from _async("step", name, number, flow, (step.sent_ns, step.done_ns))
    for index, hop in enumerate(placed.hops):
        yield from _hop(number, name, flow, hop, args)
        last = index + 1 == len(placed.hops)
        if len(placed.hops) > 1:
            yield {
                "ph": "s" if index == 0 else "f" if last else "t",
                "id": flow,
                "cat": "hop",
                "name": "hop",
                "pid": number,
                "tid": _device(hop.stage),
                "ts": hop.start_ns / 1e3,
                **({"bp": "e"} if last else {}),
            }


def _hop(
    number: int, name: str, flow: str, hop: PlacedHop, args: dict[str, int]
) -> Iterator[_Entry]:
    stage = hop.stage
    if hop.queued_ns > hop.received_ns:
        receive = (hop.received_ns, hop.queued_ns)
        yield from _async(f"stage {stage} receives", name, number, flow, receive)
    queue = (hop.queued_ns, hop.start_ns)
    yield from _async(f"stage {stage} queue", name, number, flow, queue)
    yield _slice(name, number, _device(stage), hop.start_ns, hop.end_ns, args)
    yield _slice("serialise", number, _sender(stage), hop.end_ns, hop.sent_ns, args)


def _depths(name: str, number: int, spans: Iterable[tuple[float, float]]) -> Iterator[_Entry]:
    """How many of the spans are open, whenever that changes."""
    changes = sorted([at for span in spans for at in ((span[0], 1), (span[1], -1))])
    depth = 0
    for at_ns, change in changes:
        depth += change
        yield _counter(name, number, at_ns, {"steps": depth})


def _device(stage: int) -> int:
    return 1 + 2 * stage


def _sender(stage: int) -> int:
    return 2 + 2 * stage


def _slice(
    name: str, process: int, track: int, start_ns: float, end_ns: float, args: dict[str, int]
) -> _Entry:
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": track,
        "args": args,
        "ts": start_ns / 1e3,
        "dur": max(0.0, end_ns - start_ns) / 1e3,
    }


def _async(
    category: str, name: str, process: int, flow: str, span: tuple[float, float]
) -> Iterator[_Entry]:
    for phase, at_ns in zip("be", (span[0], max(span)), strict=True):
        yield {
            "ph": phase,
            "cat": category,
            "id": f"{category} {flow}",
            "name": name,
            "pid": process,
            "tid": 0,
            "ts": at_ns / 1e3,
        }


def _counter(name: str, process: int, at_ns: float, values: dict[str, int]) -> _Entry:
    return {"ph": "C", "name": name, "pid": process, "ts": at_ns / 1e3, "args": values}


def _name(kind: str, process: int, track: int, name: str) -> _Entry:
    return {"ph": "M", "name": kind, "pid": process, "tid": track, "args": {"name": name}}
