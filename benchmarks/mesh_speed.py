"""Start-up time, time per hop and tokens/s of a mesh, by number of stages.

Each mesh is started with `stagemesh up`, measured, and ended. Meshes run one after another on the
same machine, in turn for several rounds, so that medians and ratios can be compared.

    python -m benchmarks.mesh_speed --stages 1 2 4 --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from protos import mesh_pb2, mesh_pb2_grpc
from protos import text_generation_pb2 as pb
from protos import text_generation_pb2_grpc as pb_grpc

BATCHES = (1, 8, 32)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One mesh, once. `hop_us`: time per token of a lone request outside of compute, per message
    that a step costs. `tokens_per_s` by number of streams."""

    stages: int
    startup_s: float
    tokens_per_s: dict[int, float]
    hop_us: float
    compute_us: float


@contextmanager
def _mesh(model: Path, stages: int) -> Iterator[tuple[dict[str, Any], float]]:
    with tempfile.TemporaryDirectory() as scratch:
        ready = Path(scratch, "ready.json")
        started_s = time.monotonic()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "stagemesh.cli.main", "up", "--model", str(model)),
                *("--stages", str(stages), "--grpc-port", "0", "--http-port", "0"),
                *("--scheduler-port", "0", "--ready-file", str(ready)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "STAGEMESH_THREADS_PER_STAGE": "1"},
        )
        try:
            while not ready.exists():
                if process.poll() is not None:
                    raise SystemExit(f"stagemesh up ended with {process.returncode}")
                time.sleep(0.01)
            startup_s = time.monotonic() - started_s
            yield json.loads(ready.read_text()), startup_s
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=30)


async def _tokens_per_s(target: str, batch: int, tokens: int) -> float:
    """Of `batch` streams together, from the first request to the last token."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = pb_grpc.TextGenerationStub(channel)  # type: ignore[no-untyped-call]
        started_s = time.monotonic()
        counts = await asyncio.gather(*(_stream(stub, seed, tokens) for seed in range(batch)))
        return sum(counts) / (time.monotonic() - started_s)


async def _stream(stub: pb_grpc.TextGenerationStub, seed: int, tokens: int) -> int:
    request = pb.GenerateRequest(
        text="Once upon a time",
        sampling=pb.SamplingParams(temperature=1.0, seed=seed),
        stopping=pb.StoppingCriteria(max_tokens=tokens, ignore_eos=True),
    )
    return sum([len(response.delta.token_ids) async for response in stub.Generate(request)])


def _hops(address: str, steps: int, wall_ns: float, stages: int) -> tuple[float, float]:
    """(time per hop, compute per step) in microseconds, from the timings of a lone request."""
    with grpc.insecure_channel(address) as channel:
        stub = mesh_pb2_grpc.SchedulerStub(channel)  # type: ignore[no-untyped-call]
        status = stub.GetStatus(mesh_pb2.GetStatusRequest(), timeout=10)
    compute_ns = sum(t.compute_ns for t in status.pipelines[0].mean_timings)
    return (wall_ns / steps - compute_ns) / (stages + 1) / 1e3, compute_ns / 1e3


def measure(model: Path, stages: int, tokens: int) -> Measurement:
    with _mesh(model, stages) as (ready, startup_s):
        asyncio.run(_tokens_per_s(ready["grpc"], 2, 16))  # warm-up
        lone = asyncio.run(_tokens_per_s(ready["grpc"], 1, tokens))
        hop_us, compute_us = _hops(ready["scheduler"], tokens, tokens / lone * 1e9, stages)
        rates = {1: lone}
        for batch in BATCHES[1:]:
            rates[batch] = asyncio.run(_tokens_per_s(ready["grpc"], batch, tokens))
        return Measurement(stages, startup_s, rates, hop_us, compute_us)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parents[1] / "models" / "demo"
    parser.add_argument("--model", type=Path, default=default)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    found: dict[int, list[Measurement]] = defaultdict(list)
    for _ in range(args.rounds):
        for stages in args.stages:
            found[stages].append(measure(args.model, stages, args.tokens))
    print("| stages | start-up s | hop us | compute us/step | " + _heads() + " |")
    print("|" + "---|" * (4 + len(BATCHES)))
    for stages, measurements in found.items():
        print(_row(stages, measurements))


def _heads() -> str:
    return " | ".join(f"tokens/s at {batch}" for batch in BATCHES)


def _row(stages: int, measurements: list[Measurement]) -> str:
    median = statistics.median
    rates = [median(m.tokens_per_s[batch] for m in measurements) for batch in BATCHES]
    cells = [
        str(stages),
        f"{median(m.startup_s for m in measurements):.1f}",
        f"{median(m.hop_us for m in measurements):.0f}",
        f"{median(m.compute_us for m in measurements):.0f}",
        *(f"{rate:.0f}" for rate in rates),
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
