"""Free memory is that of the machine or of the control group, whichever is less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stage_worker import host_memory, memory

CPU = torch.device("cpu")


def test_a_control_group_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = memory.available_bytes(CPU)
    assert 0 < machine < 2**62
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 200000\nactive_file 300000\ninactive_file 100000\n")
    assert memory.available_bytes(CPU) == 1_000_000 - (700_000 - 400_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(CPU) > 1_000_000


def test_freed_memory_can_be_given_back() -> None:
    memory.trim()
