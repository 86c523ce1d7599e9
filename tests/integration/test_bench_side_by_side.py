"""`benchmarks.peers` with the peer that the tests have installed: transformers beside a mesh."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.peers.make_model import SIZES, make_model
from benchmarks.peers.side_by_side import EngineFailed, EngineProcess, Wanted, compare


def command(peer: str, model: Path, *options: str) -> list[str]:
    script = [sys.executable, "-m", f"benchmarks.peers.{peer}_peer", "serve"]
    return [*script, "--model", str(model), "--threads", "1", *options]


def test_both_are_measured_in_turn(tmp_path: Path) -> None:
    make_model(tmp_path, SIZES["tiny"])
    wanted = Wanted(batches=[1, 3], prompt_tokens=5, new_tokens=32, prefill_tokens=40, rounds=2)
    with (
        EngineProcess(command("transformers", tmp_path), 1) as peer,
        EngineProcess(command("stagemesh", tmp_path), 1) as ours,
    ):
        found = compare(peer, ours, wanted)
    assert [each.what for each in found] == [
        *("decode, batch 1", "decode, batch 3", "prefill of 40")
    ]
    assert all(len(each.peer) == len(each.ours) == 2 for each in found)
    assert all(value > 0 for each in found for value in (*each.peer, *each.ours))


def test_an_engine_that_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    make_model(tmp_path, SIZES["tiny"])
    with pytest.raises(EngineFailed, match="ended with 2"):
        EngineProcess(command("stagemesh", tmp_path, "--dtype", "no-such"), 1)
