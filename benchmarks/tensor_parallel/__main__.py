"""Tensor parallelism against pipelines: what an all-reduce costs, what of a step it is, what pays.

Three tables: latency of an all-reduce by transport and size; a rank's share of a decode step in
all-reduces; tokens a second of meshes of (stages, ranks), one thread for each rank, also for each
worker that computes. Ranks beyond the cores of this host share them.

    python -m benchmarks.tensor_parallel --out found
    python -m benchmarks.tensor_parallel --parts meshes --shapes 1x1 2x1 1x2 2x2
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

# Before torch is imported, here and in the other ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.lone_stage import LLAMA_1B
from benchmarks.recovery.random_model import make
from benchmarks.tensor_parallel import all_reduce, meshes, step_share
from benchmarks.tensor_parallel.plot import draw

PARTS = ("all-reduce", "step", "meshes")


def _latencies(args: argparse.Namespace) -> list[all_reduce.Latency]:
    print("\n| transport | ranks | KiB | median µs | p99 µs |\n|---|---|---|---|---|")
    found = []
    for one in all_reduce.measure(("memory", "gloo"), args.ranks):
        print(
            f"| {one.transport} | {one.ranks} | {one.size_bytes // 1024} | {one.median_us:.0f} "
            f"| {one.p99_us:.0f} |",
            flush=True,
        )
        found.append(one)
    return found


def _shares(args: argparse.Namespace, model_dir: Path) -> None:
    print("\n| transport | weights | batch | ms/step | in all-reduces |\n|---|---|---|---|---|")
    for transport in ("memory", "gloo"):
        for quantization in args.quantization:
            for one in step_share.measure(
                model_dir,
                ranks=2,
                quantization=quantization,
                batches=args.batches,
                context=args.context,
                transport=transport,
            ):
                print(
                    f"| {transport} | {quantization} | {one.batch} | {one.step_ms:.1f} "
                    f"| {100 * one.reduce_share:.1f} % |",
                    flush=True,
                )


def _throughputs(args: argparse.Namespace, model_dir: Path) -> list[meshes.Throughput]:
    print("\n| stages | ranks of each | batch | tokens/s | per worker |\n|---|---|---|---|---|")
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for one in meshes.measure(model_dir, args.shapes, args.batches, args.up, Path(scratch)):
            print(
                f"| {one.stages} | {one.ranks} | {one.batch} | {one.tokens_per_s:.1f} "
                f"| {one.per_worker:.1f} |",
                flush=True,
            )
            found.append(one)
    return found


def _shape(text: str) -> tuple[int, int]:
    stages, ranks = text.split("x")
    return int(stages), int(ranks)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", type=Path, help="instead of four layers of a Llama of 1.1B")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="of all-reduces")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--quantization", nargs="+", default=["none", "int8"], help="of steps")
    parser.add_argument("--context", type=int, default=128, help="of steps")
    parser.add_argument(
        "--shapes", type=_shape, nargs="+", default=meshes.SHAPES, help="of meshes: STAGESxRANKS"
    )
    parser.add_argument("--up", default="", help="of meshes: further options of stagemesh up")
    parser.add_argument("--out", type=Path, help="directory for the plot")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    latencies, throughputs = [], []
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = args.model or Path(scratch, "model")
        if args.model is None and set(args.parts) - {"all-reduce"}:
            make(model_dir, LLAMA_1B)
        if "all-reduce" in args.parts:
            latencies = _latencies(args)
        if "step" in args.parts:
            _shares(args, model_dir)
        if "meshes" in args.parts:
            throughputs = _throughputs(args, model_dir)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        draw(args.out / "tensor_parallel.png", latencies, throughputs)


if __name__ == "__main__":
    main()
