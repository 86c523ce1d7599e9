"""Two pipelines under load, one of them broken: tokens/s of both, before, meanwhile and after.

The scheduler says how many streams each pipeline has; those of the broken one are the ones that
pause longest. It gets its stage back from a spare, or its streams move, as the scheduler decides.

    python -m benchmarks.recovery.replicas --out replicas.json --plot benchmarks/replicas.svg
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.recovery.load import Load, Stream, asks
from benchmarks.recovery.parts_mesh import MeshShape, PartsMesh
from benchmarks.recovery.random_model import ModelShape, make

BIN_S = 0.25


@dataclass(frozen=True, slots=True)
class Timeline:
    """Tokens in bins of BIN_S seconds; the kill is at 0 s, so the first bins are negative."""

    starts_s: list[float]
    unaffected: list[int]
    affected: list[int]
    num_unaffected: int
    num_affected: int
    longest_pause_unaffected_s: float
    longest_pause_affected_s: float

    def rate(self, of: Sequence[int], since_s: float, until_s: float) -> float:
        """Tokens/s."""
        bins = [n for n, at in zip(of, self.starts_s, strict=True) if since_s <= at < until_s]
        return sum(bins) / (len(bins) * BIN_S) if bins else 0.0

    def table(self) -> str:
        pause_s = self.longest_pause_affected_s
        windows = {
            "before": (self.starts_s[0], 0.0),
            "until the last went on": (0.0, pause_s),
            "after": (pause_s + BIN_S, self.starts_s[-1]),
        }
        lines = ["| pipeline | streams | longest pause ms | tokens/s " + " | ".join(windows) + " |"]
        lines.append("|" + "---|" * (3 + len(windows)))
        for name, of, num, longest_s in (
            ("broken", self.affected, self.num_affected, pause_s),
            ("other", self.unaffected, self.num_unaffected, self.longest_pause_unaffected_s),
        ):
            rates = " | ".join(f"{self.rate(of, *window):.0f}" for window in windows.values())
            lines.append(f"| {name} | {num} | {longest_s * 1e3:.0f} | {rates} |")
        return "\n".join(lines)


async def measure(mesh: PartsMesh, streams: int, context: int, around_s: float) -> Timeline:
    wanted = asks(streams, 1, prompt_tokens=(context,), max_tokens=4000)
    async with Load(mesh.target, wanted) as load:
        await load.until_tokens(8)
        await asyncio.sleep(around_s)  # what is measured, not something that is waited for
        status = await mesh.status()
        mesh.at(status, 1).kill()
        killed_s = time.monotonic()
        await mesh.until_whole()
        await asyncio.sleep(2 * around_s)
    return _timeline(load.streams, status.pipelines[0].num_running, killed_s, around_s)


def _timeline(
    streams: Sequence[Stream], num_affected: int, killed_s: float, around_s: float
) -> Timeline:
    by_pause = sorted(streams, key=lambda stream: -_pause_after(stream, killed_s))
    affected, unaffected = by_pause[:num_affected], by_pause[num_affected:]
    last_s = min(stream.times_s[-1] for stream in streams) - killed_s
    starts_s = [n * BIN_S - around_s for n in range(int((last_s + around_s) / BIN_S))]
    return Timeline(
        starts_s,
        _bins(unaffected, starts_s, killed_s),
        _bins(affected, starts_s, killed_s),
        len(unaffected),
        len(affected),
        _pause_after(unaffected[0], killed_s),
        _pause_after(affected[0], killed_s),
    )


def _pause_after(stream: Stream, killed_s: float) -> float:
    """The longest between two tokens of which the later came after the kill."""
    pairs = itertools.pairwise(stream.times_s)
    return max((later - earlier for earlier, later in pairs if later > killed_s), default=0.0)


def _bins(streams: Sequence[Stream], starts_s: Sequence[float], killed_s: float) -> list[int]:
    counts = [0] * len(starts_s)
    for stream in streams:
        for when in stream.times_s:
            index = int((when - killed_s - starts_s[0]) // BIN_S)
            if 0 <= index < len(counts):
                counts[index] += 1
    return counts


def draw(timeline: Timeline, out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for name, of, colour in (
        ("the other pipeline", timeline.unaffected, "#5e81ac"),
        ("the broken pipeline", timeline.affected, "#bf616a"),
    ):
        rates = [count / BIN_S for count in of]
        axes.step(timeline.starts_s, rates, where="post", color=colour, label=name)
    axes.axvline(0.0, color="#4c566a", linestyle=":", label="kill -9")
    axes.set_xlabel("s since the kill")
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


async def _main(args: argparse.Namespace, scratch: Path) -> Timeline:
    make(scratch / "model", ModelShape())
    shape = MeshShape(
        model=scratch / "model",
        stages=2,
        replicas=2,
        spares=1,
        worker_options=("--num-blocks", "1200"),
        batch_invariant=False,
    )
    async with PartsMesh(shape, scratch) as mesh:
        return await measure(mesh, args.streams, args.context, args.around)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--around", type=float, default=3.0, help="seconds before the kill")
    parser.add_argument("--out", type=Path, help="file for the timeline, as JSON")
    parser.add_argument("--plot", type=Path, help="file for the plot, .svg or .png")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        timeline = asyncio.run(_main(args, Path(scratch)))
    print(timeline.table())
    if args.out is not None:
        args.out.write_text(json.dumps(asdict(timeline)))
    if args.plot is not None:
        draw(timeline, args.plot)


if __name__ == "__main__":
    main()
