"""The environment that `stagemesh up` gives its workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.paths import DEMO_MODEL

from stagemesh.cli import services
from stagemesh.cli.up_options import UpOptions

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


def spins(options: UpOptions) -> bool:
    environ = services.worker(options, "localhost:1", 0, 0).environ
    assert environ["OMP_WAIT_POLICY"] == "PASSIVE"
    return environ.get("GOMP_SPINCOUNT", "0") != "0"


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [(None, True), ("auto", True), ("int8", True), ("int4-g64", False), ("none,0:1=int4", False)],
)
def test_threads_may_spin_for_a_while_but_beside_those_of_int4(
    quantization: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    options = UpOptions(model=DEMO_MODEL, stages=1, threads_per_stage=1, quantization=quantization)
    assert spins(options) is expected


def test_they_do_not_beside_int4_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    for told, expected in ((None, True), (AWQ, False)):
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
        options = UpOptions(model=tmp_path, stages=1, threads_per_stage=1)
        assert spins(options) is expected


def test_they_do_not_where_workers_share_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr(services, "num_cores", lambda: 2)
    assert spins(UpOptions(model=DEMO_MODEL, stages=2, threads_per_stage=1))
    assert not spins(UpOptions(model=DEMO_MODEL, stages=2, threads_per_stage=2))
