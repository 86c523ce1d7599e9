"""Reports as Markdown tables, which a terminal shows and a page of results can take as they are.

Rounds of one setting are one row, of medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from stagemesh.bench.report import Report, Setting, by_setting, median_of
from stagemesh.bench.results import MeshStart, Results
from stagemesh.bench.summary import Spread

Number = Callable[[Report], float | None]


def tables(results: Results) -> dict[str, str]:
    """By title; of own meshes and where a scheduler was asked, what there is to say of them."""
    reports = results.reports
    made = {"Throughput": throughput(reports), "Latency": latency(reports)}
    if any(report.stages for report in reports):
        made["Stages"] = stages(reports)
    if results.starts:
        made["Start-up"] = start_up(results.starts)
    return made


def throughput(reports: Sequence[Report]) -> str:
    columns: list[tuple[str, Number, str]] = [
        ("requests", lambda r: r.num_whole, ".0f"),
        ("failed", lambda r: r.num_failed, ".0f"),
        ("req/s", lambda r: r.requests_per_s, ".2f"),
        ("tokens/s", lambda r: r.output_tokens_per_s, ".1f"),
        ("with prompts", lambda r: r.total_tokens_per_s, ".1f"),
        ("at full load", lambda r: r.full_tokens_per_s, ".1f"),
        ("decoding", lambda r: r.decode_tokens_per_s, ".1f"),
        ("per worker", lambda r: r.tokens_per_s_per_worker, ".1f"),
        ("good req/s", lambda r: r.goodput.requests_per_s if r.goodput else None, ".2f"),
        ("good %", lambda r: _percent(r.goodput.share) if r.goodput else None, ".1f"),
        ("bubbles %", lambda r: _percent(r.bubble_share), ".1f"),
        ("wire B/token", lambda r: r.wire_bytes_per_token, ".0f"),
        ("hop ms", lambda r: r.hop_ms, ".3f"),
        ("client cores", lambda r: r.client_cores, ".2f"),
    ]
    return _table(reports, columns)


def latency(reports: Sequence[Report]) -> str:
    """p50 / p90 / p99 of each, in milliseconds."""
    kinds: list[tuple[str, Callable[[Report], Spread | None]]] = [
        ("TTFT", lambda r: r.ttft_ms),
        ("TPOT", lambda r: r.tpot_ms),
        ("ITL", lambda r: r.itl_ms),
        ("E2E", lambda r: r.e2e_ms),
        ("sent late", lambda r: r.lateness_ms),
    ]
    groups = by_setting(reports)
    heads = [*_setting_heads(groups), *(f"{name} ms p50 / p90 / p99" for name, _ in kinds)]
    rows = [
        [*_setting_cells(setting), *(_spread(rounds, of) for _, of in kinds)]
        for setting, rounds in groups.items()
    ]
    return _markdown(heads, rows)


def stages(reports: Sequence[Report]) -> str:
    """Of the last round of each setting: rounds of stages are not one another's."""
    groups = by_setting(reports)
    states = list(dict.fromkeys(state for r in reports for s in r.stages for state in s.shares))
    heads = [*_setting_heads(groups), "pipeline", "stage", *(f"{state} %" for state in states)]
    heads += ["steps", "rows/step", "compute ms/step", "sent MiB", "messages"]
    rows = [
        [
            *_setting_cells(setting),
            stage.pipeline,
            str(stage.stage),
            *(f"{100 * stage.shares.get(state, 0.0):.1f}" for state in states),
            str(stage.num_steps),
            f"{stage.rows_per_step:.1f}",
            f"{stage.compute_ms_per_step:.2f}",
            f"{stage.bytes_sent / 2**20:.2f}",
            str(stage.messages_sent),
        ]
        for setting, rounds in groups.items()
        for stage in rounds[-1].stages
    ]
    return _markdown(heads, rows)


def start_up(starts: Sequence[MeshStart]) -> str:
    """From the first process of a mesh until it served."""
    found: dict[tuple[int, int], list[float]] = {}
    for start in starts:
        found.setdefault((start.stages, start.threads), []).append(start.startup_s)
    rows = [
        [str(stages), str(threads), f"{statistics.median(times_s):.1f}"]
        for (stages, threads), times_s in found.items()
    ]
    return _markdown(["stages", "threads", "start-up s"], rows)


def _table(reports: Sequence[Report], columns: Sequence[tuple[str, Number, str]]) -> str:
    """Without the columns that no row has anything in."""
    groups = by_setting(reports)
    cells = {
        name: [_number(rounds, of, spec) for rounds in groups.values()]
        for name, of, spec in columns
    }
    kept = {name: column for name, column in cells.items() if any(column)}
    rows = [
        [*_setting_cells(setting), *(column[index] for column in kept.values())]
        for index, setting in enumerate(groups)
    ]
    return _markdown([*_setting_heads(groups), *kept], rows)


def _setting_heads(settings: dict[Setting, list[Report]]) -> list[str]:
    own = any(setting.stages is not None for setting in settings)
    return [*(("stages", "threads") if own else ()), "load", "prompt", "output"]


def _setting_cells(setting: Setting) -> list[str]:
    own = [] if setting.stages is None else [str(setting.stages), str(setting.threads)]
    return [*own, str(setting.load), setting.prompt, setting.output]


def _number(rounds: Sequence[Report], of: Number, spec: str) -> str:
    value = median_of(rounds, of)
    return "" if value is None else format(value, spec)


def _spread(rounds: Sequence[Report], of: Callable[[Report], Spread | None]) -> str:
    spreads = [spread for report in rounds if (spread := of(report)) is not None]
    if not spreads:
        return ""
    medians = (
        Spread.of([getattr(spread, name) for spread in spreads]) for name in ("p50", "p90", "p99")
    )
    return " / ".join(_short(median.p50) for median in medians if median is not None)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Padded, so that it can be read as it is."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [heads, [f"{'-' * (width - 1)}:" for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(f'{cell:>{width}}' for cell, width in zip(line, widths, strict=True))} |"
        for line in lines
    )
