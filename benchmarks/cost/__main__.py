"""Prints what the mesh costs: tokens per second of a mesh by those of its stages in one process.

The model is random, as large as is asked for. Both are measured in turn, several times.

    python -m benchmarks.cost --stages 1 2 --batches 1 8 32 --layers 8 --hidden 1024
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.cost.mesh import Measured, measure, mesh
from benchmarks.recovery.random_model import ModelShape, make


def in_process(model: Path, stages: int, batch: int, tokens: int, warm_up: int) -> float:
    command = [
        *(sys.executable, "-m", "benchmarks.cost.in_process", str(model)),
        *("--stages", str(stages), "--batch", str(batch)),
        *("--tokens", str(tokens), "--warm-up", str(warm_up)),
    ]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environ)
    return float(json.loads(output.stdout)["tokens_per_s"])


def row(stages: int, batch: int, alone: list[float], meshes: list[Measured]) -> list[str]:
    rates = [each.tokens_per_s for each in meshes]
    ratios = [mesh / one for mesh, one in zip(rates, alone, strict=True)]
    hops = sorted(hop for each in meshes for hop in each.hops_us)
    busy = [statistics.median(shares) for shares in zip(*(m.busy for m in meshes), strict=True)]
    return [
        str(stages),
        str(batch),
        f"{statistics.median(alone):.1f}",
        f"{statistics.median(rates):.1f}",
        f"{statistics.median(ratios):.3f}",
        " / ".join(f"{100 * share:.1f}" for share in busy),
        f"{hops[len(hops) // 2]:.0f}",
        f"{hops[int(0.99 * len(hops))]:.0f}",
    ]


HEADS = ("stages", "batch", "in process", "mesh", "ratio", "busy %", "hop us", "p99")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint instead of a random one")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--warm-up", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| " + " | ".join(HEADS) + " |\n|" + "---|" * len(HEADS))
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or Path(scratch, "model")
        if args.model is None:
            make(model, ModelShape(args.layers, args.hidden, 3 * args.hidden, args.hidden // 64))
        for stages in args.stages:
            alone: dict[int, list[float]] = {batch: [] for batch in args.batches}
            meshes: dict[int, list[Measured]] = {batch: [] for batch in args.batches}
            with mesh(model, stages) as ready:
                for _ in range(args.rounds):
                    for batch in args.batches:
                        sizes = (batch, args.tokens, args.warm_up)
                        alone[batch].append(in_process(model, stages, *sizes))
                        meshes[batch].append(asyncio.run(measure(ready, *sizes)))
            for batch in args.batches:
                cells = row(stages, batch, alone[batch], meshes[batch])
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
