"""A mesh of `stagemesh up`, its streams at full speed, and what its steps tell meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from protos import mesh_pb2, mesh_pb2_grpc
from protos import text_generation_pb2 as pb
from protos import text_generation_pb2_grpc as pb_grpc
from stagemesh.cli.stage_bars import stage_times

_TRACE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Measured:
    """While all streams ran: tokens per second; share of time that each stage was busy; for every
    step what no stage accounts for, per message, in microseconds."""

    tokens_per_s: float
    busy: tuple[float, ...]
    hops_us: tuple[float, ...]


@contextmanager
def mesh(model: Path, num_stages: int, *options: str, **environ: str) -> Iterator[dict[str, Any]]:
    """One thread a stage. What its ready file says, once it serves."""
    with tempfile.TemporaryDirectory() as scratch:
        ready = Path(scratch, "ready.json")
        log = Path(scratch, "log")
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "stagemesh.cli.main", "up", "--model", str(model)),
                    *("--stages", str(num_stages), "--grpc-port", "0", "--http-port", "0"),
                    *("--scheduler-port", "0", "--ready-file", str(ready)),
                    *options,
                ],
                stdout=sink,
                stderr=sink,
                env={**os.environ, "STAGEMESH_THREADS_PER_STAGE": "1", **environ},
            )
        try:
            while not ready.exists():
                if process.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.05)
            yield json.loads(ready.read_text())
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


async def measure(ready: dict[str, Any], batch: int, num_tokens: int, warm_up: int) -> Measured:
    """From when each stream has `warm_up` tokens until the first one ends."""
    async with (
        grpc.aio.insecure_channel(ready["grpc"]) as front,
        grpc.aio.insecure_channel(ready["scheduler"]) as control,
    ):
        generation = pb_grpc.TextGenerationStub(front)
        scheduler = mesh_pb2_grpc.SchedulerStub(control)
        counts = [0] * batch
        streams = [
            asyncio.create_task(_stream(generation, number, num_tokens, counts))
            for number in range(batch)
        ]
        while min(counts) < warm_up:  # noqa: ASYNC110 - a look now and then costs least
            await asyncio.sleep(0.01)
        began = time.monotonic(), sum(counts), await scheduler.GetStatus(_ASK)
        tracing = asyncio.create_task(_trace(scheduler))
        while max(counts) < num_tokens - 1:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        ended = time.monotonic(), sum(counts), await scheduler.GetStatus(_ASK)
        tracing.cancel()
        hops = await tracing
        await asyncio.gather(*streams)
    status = ended[2]
    times = stage_times(status.pipelines[0], status, began[2])
    return Measured(
        (ended[1] - began[1]) / (ended[0] - began[0]),
        tuple(each.shares[0] for each in times),
        tuple(hops),
    )


_ASK = mesh_pb2.GetStatusRequest()


async def _stream(generation: Any, number: int, num_tokens: int, counts: list[int]) -> None:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=range(10 + number, 18 + number)),
        sampling=pb.SamplingParams(temperature=0.0),
        stopping=pb.StoppingCriteria(max_tokens=num_tokens, ignore_eos=True),
    )
    async for response in generation.Generate(request):
        counts[number] += len(response.delta.token_ids)


async def _trace(scheduler: Any) -> list[float]:
    """Until cancelled."""
    hops: list[float] = []
    request = mesh_pb2.TraceStepsRequest(duration_ns=round(_TRACE_S * 1e9))
    with contextlib.suppress(asyncio.CancelledError):
        async for event in scheduler.TraceSteps(request):
            if event.WhichOneof("event") == "step":
                hops.append(_hop_us(event.step))  # noqa: PERF401 - what came until then counts
    return hops


def _hop_us(step: mesh_pb2.TracedStep) -> float:
    """Of S + 1 messages, each with its serialising, its way, and the event loops at both ends."""
    in_stages_ns = sum(timing.queue_ns + timing.compute_ns for timing in step.timings)
    return (step.done_ns - step.sent_ns - in_stages_ns) / (len(step.timings) + 1) / 1e3
