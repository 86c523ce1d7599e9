"""`stagemesh trace`: records what stages and scheduler do for some seconds, for Perfetto."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protos import mesh_pb2, mesh_pb2_grpc
from stagemesh.cli.client import RPC_TIMEOUT_S, SCHEDULER, connection, get_status
from stagemesh.cli.trace_file import write_trace
from stagemesh.cli.trace_places import place
from stagemesh.errors import ConfigError
from stagemesh.options import check_options, option, parse_options


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    scheduler: str = option(SCHEDULER, help="address of the scheduler")
    seconds: float = option(10.0, help="how long to record", minimum=0.1, maximum=3600)
    output: Path = option(Path("trace.json"), help="the file, for ui.perfetto.dev")
    max_steps: int = option(
        100_000, help="steps to keep at most; what comes later is left out", minimum=1
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(slots=True)
class Recording:
    """What came while it was recorded. `num_left_out` counts events."""

    steps: list[mesh_pb2.TracedStep] = field(default_factory=list)
    rounds: list[mesh_pb2.TracedRound] = field(default_factory=list)
    num_left_out: int = 0


def run(argv: Sequence[str]) -> int:
    """Raises what is wrong with the file or the scheduler."""
    words = ["--output" if word == "-o" else word for word in argv]
    options = parse_options(
        TraceOptions,
        words,
        prog="stagemesh trace",
        description="Records what the stages and the scheduler of a mesh do.",
    )
    try:
        with options.output.open("w", encoding="utf-8") as file:
            recording, workers = asyncio.run(record(options))
            write_trace(file, place(recording.steps), recording.rounds, workers)
    except OSError as error:
        raise ConfigError(f"--output {options.output}: {error.strerror or error}") from None
    print(_outcome(options, recording))
    return 0


async def record(options: TraceOptions) -> tuple[Recording, dict[str, Sequence[str]]]:
    """With the ids of the workers of each pipeline's stages, as they were at the end."""
    recording = Recording()
    async with connection(options.scheduler, "scheduler") as channel:
        stub: Any = mesh_pb2_grpc.SchedulerStub(channel)  # type: ignore[no-untyped-call]
        request = mesh_pb2.TraceStepsRequest(duration_ns=round(options.seconds * 1e9))
        async for event in stub.TraceSteps(request, timeout=options.seconds + RPC_TIMEOUT_S):
            _take(recording, event, options.max_steps)
        status = await get_status(channel)
    return recording, {each.pipeline_id: list(each.worker_ids) for each in status.pipelines}


def _take(recording: Recording, event: mesh_pb2.TraceStepsResponse, max_steps: int) -> None:
    kind = event.WhichOneof("event")
    if kind == "num_dropped":
        recording.num_left_out += event.num_dropped
    elif kind == "step" and len(recording.steps) < max_steps:
        recording.steps.append(event.step)
    elif kind == "round" and len(recording.rounds) < max_steps:
        recording.rounds.append(event.round)
    else:
        recording.num_left_out += 1


def _outcome(options: TraceOptions, recording: Recording) -> str:
    left_out = f"; {recording.num_left_out} events left out" if recording.num_left_out else ""
    return (
        f"{len(recording.steps)} steps in {len(recording.rounds)} rounds are in {options.output}"
        f"{left_out}: open it at ui.perfetto.dev"
    )
