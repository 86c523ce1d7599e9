"""Random kills under constant load: is one request lost, or one token different?

A mesh of three stages and a spare serves streams without a pause; every answer is compared, token
for token, with that of an undisturbed run. Whatever is killed is started again a moment later. One
fault follows another when streams have gone on, and some of them sooner. Run it overnight:

    python -m benchmarks.recovery.kills --kills 1000

It prints a summary, and exits with 1 if a request was lost or differed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.recovery.faults import Faults
from benchmarks.recovery.load import Load, Stream, Truth, asks
from benchmarks.recovery.part import REPO
from benchmarks.recovery.parts_mesh import MeshShape, PartsMesh

LEASE_S = 2.0
# A stream that does not go on within this is lost.
STREAM_TIMEOUT_S = 300.0
CALM_TIMEOUT_S = 120.0
HASTE = 0.25


@dataclass
class Tally:
    """What came of a run."""

    seed: int
    num_kills: int = 0
    num_ended: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)
    num_streams: int = 0
    num_tokens: int = 0
    wall_s: float = 0.0
    latest: str = ""

    def line(self) -> str:
        return (
            f"{self.num_kills}: {self.latest}; {self.num_streams} streams, "
            f"{len(self.faults)} faulty"
        )

    def take(self, streams: Sequence[Stream], truth: Truth) -> None:
        self.num_streams += len(streams)
        self.num_tokens += sum(len(stream.token_ids) for stream in streams)
        self.faults += truth.faults(streams)

    def summary(self) -> str:
        kinds = ", ".join(f"{kind} {num}" for kind, num in sorted(self.kinds.items()))
        lines = [
            f"{self.num_kills} kills in {self.kinds.total()} faults ({kinds}), seed {self.seed}, "
            f"{self.wall_s:.0f} s; {self.num_ended} processes ended by themselves",
            f"{self.num_streams} streams, {self.num_tokens} tokens, {len(self.faults)} faulty",
            *self.faults[:20],
        ]
        if self.pauses_s:
            halves = statistics.quantiles(self.pauses_s, n=10)
            lines.insert(
                2,
                f"from a fault until every stream has gone on: median {halves[4]:.1f} s, "
                f"90 % {halves[8]:.1f} s, longest {max(self.pauses_s):.1f} s",
            )
        return "\n".join(lines)


async def run(
    mesh: PartsMesh, num_kills: int, streams: int, seed: int, kinds: Sequence[str]
) -> Tally:
    """`mesh` is whole before and after. Raises AssertionError where it does not become so."""
    rng, truth, tally = random.Random(seed), Truth(), Tally(seed)
    wanted = asks(streams, seed, max_tokens=64)
    await truth.learn(mesh.target, wanted)
    started_s = time.monotonic()
    faults = Faults(mesh, rng, LEASE_S)
    keeper = asyncio.create_task(faults.keep())
    try:
        async with Load(
            mesh.target, wanted, timeout_s=STREAM_TIMEOUT_S, repeat=len(wanted)
        ) as load:
            await load.until_tokens(1)
            while tally.num_kills < num_kills:
                await _strike(mesh, faults, rng.choice(list(kinds) or faults.kinds), load, tally)
                _take_done(load, tally, truth)
                print(tally.line(), flush=True)
            await load.finish()
            _take_done(load, tally, truth)
        await mesh.restore()
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
    tally.num_ended = faults.num_ended
    tally.wall_s = time.monotonic() - started_s
    return tally


async def _strike(mesh: PartsMesh, faults: Faults, kind: str, load: Load, tally: Tally) -> None:
    """Some faults do not wait until the mesh has got over the one before."""
    struck_s = time.monotonic()
    fault = await faults.strike(kind)
    tally.num_kills += fault.num_kills
    tally.kinds[fault.kind] += 1
    if faults.rng.random() >= HASTE:
        await mesh.until_whole(CALM_TIMEOUT_S)
        await _until_all_go_on(load, struck_s)
        tally.pauses_s.append(time.monotonic() - struck_s)
    victims = ", ".join(fault.victims)
    tally.latest = f"{fault.kind} ({victims}), {time.monotonic() - struck_s:.1f} s"


def _take_done(load: Load, tally: Tally, truth: Truth) -> None:
    done, load.done[:] = list(load.done), []
    tally.take(done, truth)


async def _until_all_go_on(load: Load, since_s: float) -> None:
    """Until every stream has had a token since, or began since and has one."""
    deadline = time.monotonic() + CALM_TIMEOUT_S
    while any(not s.times_s or s.times_s[-1] < since_s for s in load.streams):
        assert time.monotonic() < deadline, f"some stream stands still for {CALM_TIMEOUT_S} s"
        await asyncio.sleep(0.02)


async def _main(args: argparse.Namespace) -> int:
    shape = MeshShape(model=args.model, stages=args.stages, spares=args.spares, may_be_recut=True)
    with tempfile.TemporaryDirectory(prefix="stagemesh-kills-") as scratch:
        mesh = PartsMesh(shape, Path(scratch))
        try:
            async with mesh:
                tally = await run(mesh, args.kills, args.streams, args.seed, args.kinds)
        except BaseException:
            print(mesh.describe())
            raise
    print(tally.summary())
    return 1 if tally.faults else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=16, help="at any time")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--spares", type=int, default=1)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--model", type=Path, default=REPO / "models" / "demo")
    parser.add_argument("--kinds", nargs="*", default=[], help="of faults, else all")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    sys.exit(asyncio.run(_main(args)))


if __name__ == "__main__":
    main()
