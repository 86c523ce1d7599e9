"""Draws reports: throughput against load, latency against load, what each stage's time went to.

matplotlib is imported when something is drawn; `require_matplotlib` says early that it is missing.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stagemesh.bench.report import Report, Setting, by_setting, median_of
from stagemesh.bench.stage_usage import StageUsage
from stagemesh.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#5e81ac", "#d08770", "#a3be8c", "#b48ead", "#ebcb8b", "#4c566a", "#88c0d0", "#bf616a")
_STATE_COLOURS = {
    "busy": "#a3be8c",
    "serialise": "#5e81ac",
    "output wait": "#d08770",
    "input wait": "#ebcb8b",
    "unscheduled": "#e5e9f0",
}
_AXES = {
    "batch": "requests at once",
    "concurrency": "requests under way",
    "rate": "requests per second",
    "trace": "trace's rate, times",
}
MAX_STAGE_BARS = 24
Number = Callable[[Report], float | None]


def require_matplotlib() -> None:
    """Raises ConfigError where plots cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "plots need matplotlib: pip install 'stagemesh[bench]', or say --no-plots"
        )


def draw_all(reports: Sequence[Report]) -> dict[str, bytes]:
    """PNGs by the name of their file."""
    drawn = {
        "throughput.png": throughput(reports),
        "latency.png": latency(reports),
    }
    if any(report.stages for report in reports):
        drawn["stages.png"] = stage_shares(reports)
    return {name: png(figure) for name, figure in drawn.items()}


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def throughput(reports: Sequence[Report]) -> Figure:
    """Output tokens a second; of batches also while all are decoding."""
    panels = _by_load_kind(reports)
    figure, all_axes = _panels(len(panels))
    for axes, (kind, found) in zip(all_axes, panels.items(), strict=True):
        _lines(axes, found, lambda r: r.output_tokens_per_s, "")
        if kind == "batch":
            _lines(axes, found, lambda r: r.decode_tokens_per_s, ", decoding", dashed=True)
        _finish(axes, kind, "output tokens per second")
    return figure


def latency(reports: Sequence[Report]) -> Figure:
    """Time to the first token on the left, time per token on the right: p50 whole, p99 dashed."""
    panels = _by_load_kind(reports)
    figure, all_axes = _panels(2, rows=len(panels))
    for index, (kind, found) in enumerate(panels.items()):
        left, right = all_axes[2 * index : 2 * index + 2]
        _lines(left, found, lambda r: r.ttft_ms.p50 if r.ttft_ms else None, " p50")
        _lines(left, found, lambda r: r.ttft_ms.p99 if r.ttft_ms else None, " p99", dashed=True)
        _finish(left, kind, "time to first token, ms")
        _lines(right, found, lambda r: r.tpot_ms.p50 if r.tpot_ms else None, " p50")
        _lines(right, found, lambda r: r.tpot_ms.p99 if r.tpot_ms else None, " p99", dashed=True)
        _finish(right, kind, "time per output token, ms")
    return figure


def stage_shares(reports: Sequence[Report]) -> Figure:
    """One bar per stage and run: what its worker's time went to."""
    from matplotlib.figure import Figure

    bars = [
        (_bar_name(setting, stage), stage)
        for setting, rounds in by_setting(reports).items()
        for stage in rounds[-1].stages
    ][:MAX_STAGE_BARS]
    states = list(dict.fromkeys(state for _, stage in bars for state in stage.shares))
    figure = Figure(figsize=(8.0, 1.2 + 0.32 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    names = [name for name, _ in bars]
    lefts = [0.0] * len(bars)
    for index, state in enumerate(states):
        widths = [100 * stage.shares.get(state, 0.0) for _, stage in bars]
        colour = _STATE_COLOURS.get(state, COLOURS[index % len(COLOURS)])
        drawn = axes.barh(names, widths, left=lefts, color=colour, label=state)
        if index == 0:
            axes.bar_label(drawn, [f"{width:.0f} %" for width in widths], label_type="center")
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of a stage's time, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=max(1, len(states)), frameon=False)
    return figure


def _bar_name(setting: Setting, stage: StageUsage) -> str:
    mesh = "" if setting.stages is None else f"{setting.stages}x{setting.threads}, "
    lengths = f"{setting.prompt} → {setting.output}"
    return f"{mesh}{setting.load}, {lengths}: {stage.pipeline} stage {stage.stage}"


def _by_load_kind(reports: Sequence[Report]) -> dict[str, list[Report]]:
    found: dict[str, list[Report]] = {}
    for report in reports:
        found.setdefault(report.setting.load.kind.value, []).append(report)
    return found


def _panels(columns: int, rows: int = 1) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * max(1, columns), 4.2 * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(rows * columns)]
    return figure, axes


def _lines(
    axes: Any, reports: Sequence[Report], number: Number, suffix: str, *, dashed: bool = False
) -> None:
    """A line for each mesh and pair of lengths, over the levels of the load."""
    series: dict[str, list[tuple[float, float]]] = {}
    for setting, rounds in by_setting(reports).items():
        points = series.setdefault(_series_name(setting), [])
        value = median_of(rounds, number)
        if value is not None:
            points.append((setting.load.level, value))
    for index, (name, points) in enumerate(series.items()):
        if points:
            axes.plot(
                *zip(*sorted(points), strict=True),
                linestyle="--" if dashed else "-",
                marker="o",
                color=COLOURS[index % len(COLOURS)],
                label=f"{name}{suffix}",
            )


def _series_name(setting: Setting) -> str:
    lengths = f"{setting.prompt} → {setting.output}"
    return f"{setting.mesh}, {lengths}" if setting.mesh else lengths


def _finish(axes: Any, kind: str, label: str) -> None:
    axes.set_xlabel(_AXES[kind])
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", integer=kind in ("batch", "concurrency"))
    axes.grid(visible=True, color="#eceff4")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")
