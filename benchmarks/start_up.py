"""How long `stagemesh up` takes to serve, and to serve again after a worker was killed.

With a template that forks workers and their ranks, and with all of them executed; in turn, round
after round, of which medians are printed. Processor time is that of all processes of the mesh until
it has ended, one kill included.

    python -m benchmarks.start_up --shapes 2x1 4x1 2x2 1x4 --rounds 5
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from benchmarks.cost.mesh import mesh
from protos import text_generation_pb2 as pb
from protos import text_generation_pb2_grpc as pb_grpc

DEMO_MODEL = Path(__file__).parents[1] / "models" / "demo"
# Workers are executed where the template that this names is not there.
_WAYS = {"forked": {}, "executed": {"STAGEMESH_WORKER_TEMPLATE": "/nonexistent"}}
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds: until the mesh served, from a kill to the end of the request that waited for the
    worker to be back, and of all processors."""

    serves_s: float
    serves_again_s: float
    processor_s: float


def measure(model: Path, stages: int, ranks: int, environ: dict[str, str]) -> Start:
    used_s, began_s = _processor_s(), time.monotonic()
    options = ("--restart", "--tensor-parallel", str(ranks), "--num-blocks", "256")
    with mesh(model, stages, *options, **environ) as ready:
        serves_s = time.monotonic() - began_s
        with grpc.insecure_channel(ready["grpc"]) as channel:
            stub = pb_grpc.TextGenerationStub(channel)
            _generate(stub)
            workers = [p["pid"] for p in ready["processes"] if p["role"] == "worker"]
            killed_s = time.monotonic()
            os.kill(workers[0], signal.SIGKILL)
            _generate(stub)
            serves_again_s = time.monotonic() - killed_s
    return Start(serves_s, serves_again_s, _processor_s() - used_s)


def _generate(stub: Any) -> None:
    request = pb.GenerateRequest(
        text="Once upon a time",
        sampling=pb.SamplingParams(temperature=0.0),
        stopping=pb.StoppingCriteria(max_tokens=8, ignore_eos=True),
    )
    for _ in stub.Generate(request, timeout=_TIMEOUT_S):
        pass


def _processor_s() -> float:
    """Of children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _shape(text: str) -> tuple[int, int]:
    stages, ranks = text.split("x")
    return int(stages), int(ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument(
        "--shapes",
        type=_shape,
        nargs="+",
        default=[(2, 1), (4, 1), (2, 2), (1, 4)],
        help="STAGESxRANKS",
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print("| stages | ranks of each | workers are | serves, s | serves again, s | processors, s |")
    print("|---|---|---|---|---|---|")
    for stages, ranks in args.shapes:
        found: dict[str, list[Start]] = {way: [] for way in _WAYS}
        for _ in range(args.rounds):
            for way, environ in _WAYS.items():
                found[way].append(measure(args.model, stages, ranks, environ))
        for way, starts in found.items():
            medians = (
                statistics.median(getattr(start, name) for start in starts)
                for name in ("serves_s", "serves_again_s", "processor_s")
            )
            print(f"| {stages} | {ranks} | {way} |", *(f"{each:.1f} |" for each in medians))


if __name__ == "__main__":
    main()
