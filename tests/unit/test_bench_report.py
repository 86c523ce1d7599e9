"""From samples to a report, and from reports to JSON, tables, plots and a page."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from stagemesh.bench.page import page
from stagemesh.bench.plots import draw_all
from stagemesh.bench.report import MeshView, Report, Setting, make_report
from stagemesh.bench.results import MeshStart, Results
from stagemesh.bench.samples import Sample
from stagemesh.bench.stage_usage import StageUsage
from stagemesh.bench.summary import Objective
from stagemesh.bench.tables import tables
from stagemesh.bench.workload import Ask, Load, LoadKind


def sample(due_s: float, *times_s: float, **fields: Any) -> Sample:
    made = Sample(Ask(10, 4, 0), due_s, sent_s=due_s + 0.5, ended_s=max(times_s, default=due_s))
    made.deliveries = [(time_s, 1) for time_s in times_s]
    made.output_tokens = len(times_s)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


SAMPLES = [
    sample(0.0, 1.0, 2.0, 3.0, 4.0, prompt_tokens=12, cached_prompt_tokens=8),
    sample(1.0, 2.0, 4.0, 6.0, 10.0, prompt_tokens=12),
    sample(2.0, 3.0, 4.0, cancelled=True),
    sample(3.0, 5.0, error="peer_lost: gone"),
]


def stage(number: int, busy: float, worker: str = "") -> StageUsage:
    return StageUsage(
        pipeline="p0",
        stage=number,
        worker=worker or f"worker-{number}",
        shares={"busy": busy, "input wait": 1 - busy},
        num_steps=10,
        rows_per_step=2.0,
        compute_ms_per_step=5.0,
        bytes_sent=500,
        messages_sent=10,
    )


def setting(kind: LoadKind = LoadKind.CONCURRENCY, level: float = 2) -> Setting:
    return Setting(Load(kind, level), prompt="10", output="4", stages=2, threads=1)


def report(mesh: MeshView | None = None, of: Setting | None = None, **fields: Any) -> Report:
    objective = Objective(ttft_s=1.0, e2e_s=5.0)
    fields = {"client_cpu_s": 1.0, "objective": objective, "mesh": mesh, **fields}
    return make_report(of or setting(), SAMPLES, **fields)


def test_counts_and_rates_are_of_the_whole_run() -> None:
    made = report()
    assert (made.num_requests, made.num_whole, made.num_cancelled, made.num_failed) == (4, 2, 1, 1)
    assert made.errors == {"peer_lost: gone": 1}
    assert made.duration_s == 10.0
    assert made.requests_per_s == pytest.approx(0.2)
    # What a failed request had got does not count; a cancelled one's tokens were wanted.
    assert made.output_tokens == 10
    assert made.output_tokens_per_s == pytest.approx(1.0)
    # Twice the server's count, once what was asked for.
    assert made.prompt_tokens == 34
    assert made.cached_prompt_tokens == 8
    assert made.client_cores == pytest.approx(0.1)


def test_latencies_are_of_whole_requests_from_when_they_were_due() -> None:
    made = report()
    assert made.ttft_ms is not None
    assert (made.ttft_ms.num, made.ttft_ms.p50) == (2, 1000.0)
    assert made.e2e_ms is not None
    assert made.e2e_ms.max == 9000.0
    assert made.tpot_ms is not None
    assert made.tpot_ms.max == pytest.approx(8000 / 3)
    assert made.lateness_ms is not None
    assert made.lateness_ms.num == 4
    assert made.lateness_ms.p50 == pytest.approx(500.0)


def test_goodput_counts_what_failed_as_bad_and_what_was_cancelled_not_at_all() -> None:
    goodput = report().goodput
    assert goodput is not None
    assert goodput.share == pytest.approx(1 / 3)
    assert goodput.requests_per_s == pytest.approx(0.1)
    assert report(objective=Objective()).goodput is None


def test_bubbles_bytes_and_hops_are_of_the_mesh() -> None:
    view = MeshView([stage(0, 0.9), stage(1, 0.5)], num_workers=2, step_compute_ms=1000.0)
    made = report(view)
    assert made.bubble_share == pytest.approx(0.3)
    assert made.tokens_per_s_per_worker == pytest.approx(0.5)
    assert made.wire_bytes_per_token == pytest.approx(100.0)
    assert made.hop_ms is None
    lone = report(view, of=setting(level=1))
    assert lone.tpot_ms is not None
    assert lone.hop_ms == pytest.approx((lone.tpot_ms.p50 - 1000.0) / 3)


def test_a_worker_of_two_pipelines_sends_its_bytes_once() -> None:
    both = [stage(0, 0.5, "shared"), stage(0, 0.5, "shared")]
    made = report(MeshView(both, num_workers=1, step_compute_ms=1.0))
    assert made.wire_bytes_per_token == pytest.approx(50.0)


def test_open_loops_have_no_full_load() -> None:
    assert report(of=setting(LoadKind.RATE, 0.5)).full_tokens_per_s is None
    assert report().full_tokens_per_s is not None
    assert report().decode_tokens_per_s is None
    assert report(of=setting(LoadKind.BATCH, 2)).decode_tokens_per_s is not None


def results() -> Results:
    view = MeshView([stage(0, 0.9), stage(1, 0.5)], num_workers=2, step_compute_ms=1.0)
    return Results(
        machine={"command": "stagemesh bench <&>", "started": "2026-11-26", "cpu": "x"},
        target="own meshes",
        model="demo <model>",
        seed=7,
        starts=[MeshStart(2, 1, number, float(number)) for number in (1, 2, 6)],
        reports=[
            report(view, round_number=1),
            report(view, round_number=2, client_cpu_s=3.0),
            report(view, of=setting(LoadKind.RATE, 0.5)),
            report(of=setting(LoadKind.BATCH, 8)),
        ],
    )


def test_results_are_json() -> None:
    read = json.loads(results().as_json())
    assert read["seed"] == 7
    assert [each["setting"]["load"]["kind"] for each in read["reports"]] == [
        *("concurrency", "concurrency", "rate", "batch")
    ]
    assert read["reports"][0]["stages"][0]["shares"] == {
        "busy": 0.9,
        "input wait": pytest.approx(0.1),
    }
    assert read["reports"][0]["ttft_ms"]["p99"] > 0


def test_tables_have_a_row_for_each_setting_of_medians_over_rounds() -> None:
    made = tables(results())
    assert list(made) == ["Throughput", "Latency", "Stages", "Start-up"]
    heads, _, first, *others = made["Throughput"].splitlines()
    assert len(others) == 2
    row = dict(zip(cells(heads), cells(first), strict=True))
    assert row["load"] == "concurrency 2"
    assert row["client cores"] == "0.20"
    assert row["bubbles %"] == "30.0"
    assert "2.0" in made["Start-up"].splitlines()[2]
    # A column of which no row has anything is not there.
    assert "hop ms" not in heads


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_page_needs_nothing_beside_it_and_escapes_what_it_shows() -> None:
    plots = draw_all(results().reports)
    assert set(plots) == {"throughput.png", "latency.png", "stages.png"}
    assert all(data.startswith(b"\x89PNG") for data in plots.values())
    text = page(results(), plots)
    assert text.count("data:image/png;base64,") == 3
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    assert "demo &lt;model&gt;" in text
    assert "bench &lt;&amp;&gt;" in text
    assert "requests failed" in text
