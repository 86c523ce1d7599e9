"""`stagemesh quantize`: what it says, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.paths import DEMO_MODEL

from stagemesh.cli.main import main
from stagemesh.model_spec import ModelSpec
from stagemesh.stored_format import StoredWeights


def test_a_copy_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(DEMO_MODEL), str(out), "--scheme", "int4-g32"]) == 0
    assert "MiB, int4-g32" in capsys.readouterr().out
    stored = ModelSpec.from_directory(out).stored
    assert stored is not None
    way = stored.of_weight("model.layers.3.mlp.up_proj.weight")
    assert way == StoredWeights("packed", 4, group_size=32, symmetric=False)
    assert stored.of_weight("lm_head.weight") == StoredWeights("int", 8)
    assert main(["quantize", str(DEMO_MODEL), str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_wrong_scheme_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(DEMO_MODEL), str(tmp_path / "out"), "--scheme", "int3"]) == 2
    assert "int3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
