"""`stagemesh bench` on real meshes: by gRPC, by HTTP as on any server, and on one of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.mesh import Mesh, running_mesh
from support.paths import DEMO_MODEL

from stagemesh.cli import bench
from stagemesh.errors import PeerLost


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with running_mesh(DEMO_MODEL) as running:
        yield running


def measured(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert bench.run([*argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_running_mesh_by_grpc(
    mesh: Mesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = ("--gateway", mesh.ready["grpc"], "--scheduler", mesh.ready["scheduler"])
    load = ("--batch", "1,3", "--prompt-tokens", "20", "--output-tokens", "12", "--seed", "5")
    found = measured(capsys, *target, *load, "--slo-e2e", "1h", "--out", str(tmp_path / "out"))
    assert [report["num_whole"] for report in found["reports"]] == [1, 3]
    for report in found["reports"]:
        num = report["num_requests"]
        assert (report["prompt_tokens"], report["output_tokens"]) == (20 * num, 12 * num)
        assert report["cached_prompt_tokens"] == 0
        assert report["goodput"]["share"] == 1.0
        assert report["decode_tokens_per_s"] > 0
        first, last = report["stages"]
        # Each step of this run and of no other, on both stages: 20 prompt tokens, then decoding.
        assert first["num_steps"] == last["num_steps"] >= 12
        assert first["bytes_sent"] > last["bytes_sent"] > 0
        assert 0 < report["bubble_share"] < 1
    assert found["reports"][0]["hop_ms"] is not None
    assert (found["seed"], found["model"]) == (5, "demo")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("results.json", "report.html", "throughput.png", "latency.png", "stages.png")
    }
    assert json.loads((tmp_path / "out" / "results.json").read_text())["seed"] == 5


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_the_same_mesh_as_any_server_of_openais_api(
    mesh: Mesh, endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = ("--url", f"{mesh.http_url}/v1", "--endpoint", endpoint)
    load = ("--rate", "20", "--num-requests", "5", "--prompt-tokens", "60", "--output-tokens", "9")
    found = measured(capsys, *target, *load, "--warm-up", "1")
    (report,) = found["reports"]
    assert (report["num_whole"], report["output_tokens"]) == (5, 5 * 9)
    # Words come near the wanted length; the count is the server's.
    assert report["prompt_tokens"] == pytest.approx(5 * 60, rel=0.2)
    assert report["ttft_ms"]["num"] == 5
    assert report["stages"] == []


def test_a_trace_keeps_its_lengths_and_leaves_out_what_does_not_fit(
    mesh: Mesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"timestamp": 0, "input_length": 40, "output_length": 4, "hash_ids": [1]},
        {"timestamp": 10, "input_length": 40, "output_length": 4, "hash_ids": [1]},
        {"timestamp": 20, "input_length": 90_000, "output_length": 4, "hash_ids": [1, 2]},
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, lines)))
    target = ("--gateway", mesh.ready["grpc"], "--trace", str(trace), "--warm-up", "0")
    found = measured(capsys, *target, "--rate-scale", "0.05")
    (report,) = found["reports"]
    assert (report["prompt_tokens"], report["output_tokens"]) == (80, 8)
    # The second prompt is the first one's block, of which the first had left its KV.
    assert report["cached_prompt_tokens"] >= 16
    assert any("left out" in note for note in found["notes"])


def test_an_own_mesh_is_started_measured_and_ended(capsys: pytest.CaptureFixture[str]) -> None:
    load = ("--concurrency", "2", "--num-requests", "3", "--output-tokens", "5")
    found = measured(capsys, "--stages", "1", "--threads", "1", *load, "--cancel-share", "1")
    (report,) = found["reports"]
    assert report["num_cancelled"] == 3
    assert (report["setting"]["stages"], report["setting"]["threads"]) == (1, 1)
    assert report["num_workers"] == len(report["stages"]) == 1
    (start,) = found["starts"]
    assert start["startup_s"] > 0


def test_nobody_there_is_one_line() -> None:
    with pytest.raises(PeerLost, match="no gateway answers"):
        bench.run(["--gateway", "127.0.0.1:1"])
    with pytest.raises(PeerLost, match="no server answers"):
        bench.run(["--url", "http://127.0.0.1:1/v1"])


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import importlib.util as util; found = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name == 'matplotlib' else found(name, *a)\n"
        "from stagemesh.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", "--gateway", "127.0.0.1:1", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'stagemesh[bench]'" in done.stderr
