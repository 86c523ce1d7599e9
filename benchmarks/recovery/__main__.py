"""`python -m benchmarks.recovery`: from a kill to the next token, by context and by way of rebuild.

Each way has a mesh of its own, with a spare for each stage that has its layers loaded, in which a
lone stream of each context loses the worker of one stage several times over:

- *log*: the lost stage is rebuilt from what the stage before it had sent;
- *partial*: without that log, by computing through the stages before it again;
- *full*: all stages are lost, and everything is computed anew;
- *frozen*: as *log*, of a worker that is stopped and not killed.

    python -m benchmarks.recovery --trials 5 --out recovery.json
    python -m benchmarks.recovery.plot recovery.json benchmarks/recovery.svg
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.recovery.parts_mesh import MeshShape, PartsMesh
from benchmarks.recovery.random_model import ModelShape, make
from benchmarks.recovery.tables import Found, tables
from benchmarks.recovery.trial import measure_baseline, measure_recovery

MODES = ("log", "partial", "full", "frozen")
_BLOCKS = "700"


def mesh_shape(model: Path, mode: str, num_stages: int, batch_invariant: bool) -> MeshShape:
    workers: tuple[str, ...] = ("--num-blocks", _BLOCKS)
    if mode == "partial":
        workers = (*workers, "--max-log-memory", "0")
    return MeshShape(
        model=model,
        stages=num_stages,
        spares=num_stages,
        scheduler_options=("--heartbeat-interval", "100ms", "--no-prefix-cache"),
        worker_options=workers,
        batch_invariant=batch_invariant,
    )


async def measure(args: argparse.Namespace, model: Path) -> list[Found]:
    found = []
    for mode in args.modes:
        shape = mesh_shape(model, mode, args.stages, args.batch_invariant)
        lost = range(args.stages) if mode == "full" else [args.stage]
        with tempfile.TemporaryDirectory() as scratch:
            async with PartsMesh(shape, Path(scratch)) as mesh:
                for context in args.contexts:
                    found += await _trials(mesh, mode, context, list(lost), args.trials)
    return found


async def _trials(
    mesh: PartsMesh, mode: str, context: int, stages: Sequence[int], num: int
) -> list[Found]:
    await measure_baseline(mesh, context, seed=0)  # warms up
    found = []
    for seed in range(1, num + 1):
        baseline = await measure_baseline(mesh, context, seed)
        recovery = await measure_recovery(mesh, baseline, stages, freeze=mode == "frozen")
        found.append(Found(mode, recovery))
        print(found[-1].line(), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--contexts", type=int, nargs="+", default=[100, 1000, 4000])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--stage", type=int, default=2, help="which is lost")
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--out", type=Path, help="file for all that was found, as JSON")
    args = parser.parse_args()
    shape = ModelShape()
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "random-llama")
        make(model, shape)
        found = asyncio.run(measure(args, model))
    print(tables(found, shape, args.stages))
    if args.out is not None:
        args.out.write_text(json.dumps([dataclasses.asdict(each) for each in found], indent=1))


if __name__ == "__main__":
    main()
