"""One picture: all-reduce latency by size, and decode throughput per worker by batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tensor_parallel.all_reduce import Latency
from benchmarks.tensor_parallel.meshes import Throughput
from stagemesh.bench.plots import COLOURS, png


def draw(out: Path, latencies: Sequence[Latency], throughputs: Sequence[Throughput]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.8, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for one in latencies:
        points = by_kind.setdefault(f"{one.transport}, {one.ranks} ranks", [])
        points.append((one.size_bytes / 1024, one.median_us))
    _lines(left, by_kind, "KiB", "all-reduce, µs, median")
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.xaxis.set_major_formatter("{x:g}")
    left.yaxis.set_major_formatter("{x:g}")
    by_shape: dict[str, list[tuple[float, float]]] = {}
    for each in throughputs:
        points = by_shape.setdefault(f"PP {each.stages}, TP {each.ranks}", [])
        points.append((each.batch, each.per_worker))
    _lines(right, by_shape, "requests at once", "tokens/s per process that computes, decoding")
    right.set_ylim(bottom=0)
    out.write_bytes(png(figure))


def _lines(
    axes: Any, series: dict[str, list[tuple[float, float]]], x_label: str, y_label: str
) -> None:
    for index, (name, points) in enumerate(series.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", color=COLOURS[index], label=name)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, color="#eceff4")
    axes.spines[["top", "right"]].set_visible(False)
    if series:
        axes.legend(frameon=False, fontsize="small")
