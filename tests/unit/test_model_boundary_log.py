"""The boundary log: what is written is read, what is beyond is left out, and what it costs."""

from __future__ import annotations

import pytest
import torch
from support.paths import DEMO_MODEL

from stage_worker import boundary_log, kv_cache
from stage_worker.boundary_log import (
    NOT_LOGGED,
    BoundaryLog,
    choose_num_log_blocks,
    log_block_bytes,
)
from stage_worker.kv_cache import LogCost, choose_num_blocks
from stagemesh.model_spec import ModelSpec

CPU = torch.device("cpu")


def test_slots_of_logged_blocks_are_kept_and_others_left_out() -> None:
    log = BoundaryLog(num_blocks=2, block_size_tokens=4, hidden_size=3, dtype=torch.float32)
    slots = torch.tensor([7, NOT_LOGGED, 0, NOT_LOGGED])
    hidden = torch.arange(12.0).view(4, 3)
    assert not log.holds(slots)
    log.write(slots, hidden)
    assert log.holds(torch.tensor([7, 0]))
    assert torch.equal(log.read(torch.tensor([7, 0])), hidden[[0, 2]])
    log.write(torch.tensor([7]), hidden[1:2])
    assert torch.equal(log.read(torch.tensor([7])), hidden[1:2])
    assert log.block_bytes == log_block_bytes(3, 4, 4) == 48


def test_no_log_takes_nothing() -> None:
    log = BoundaryLog(num_blocks=0, block_size_tokens=4, hidden_size=3, dtype=torch.float32)
    log.write(torch.tensor([NOT_LOGGED, NOT_LOGGED]), torch.zeros(2, 3))
    assert log.holds(torch.tensor([], dtype=torch.int64))
    assert not log.holds(torch.tensor([NOT_LOGGED]))
    assert log.block_bytes == 0


def test_how_many_blocks_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary_log, "available_bytes", lambda _: 4000)
    assert choose_num_log_blocks(5, 100, None) == 5
    assert choose_num_log_blocks(50, 100, None) == 10
    assert choose_num_log_blocks(50, 100, 2999) == 29
    assert choose_num_log_blocks(50, 100, 0) == 0


def test_kv_and_log_share_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of what is free is for both where no budget for KV is given."""
    spec = ModelSpec.from_directory(DEMO_MODEL)
    monkeypatch.setattr(kv_cache, "available_bytes", lambda _: 4 * 120_000)

    def num_blocks(budget: int | None, log: LogCost) -> int:
        return choose_num_blocks(spec, 100, 16, budget, CPU, log)

    assert num_blocks(None, LogCost(0, 0)) == 1200
    assert num_blocks(None, LogCost(20, None)) == 1000
    assert num_blocks(None, LogCost(20, 10_000)) == 1100
    assert num_blocks(None, LogCost(20, 0)) == 1200
    assert num_blocks(50_000, LogCost(20, None)) == 500
