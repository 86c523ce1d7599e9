"""Collectives: sums and exchanges of every size, the same on all ranks, whatever carries them."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from stage_worker.collectives import ALONE, Group
from stage_worker.gloo_group import GlooGroup
from stage_worker.rank_options import SLOT_BYTES, memory_bytes
from stage_worker.shared_memory_group import SharedMemoryGroup

TIMEOUT_S = 60


def together(size: int, make: Callable[[int], Group], work: Callable[[Group], Any]) -> list[Any]:
    """What `work` gives on each rank, ranks being threads."""
    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(lambda rank=rank: work(make(rank))) for rank in range(size)]
        return [future.result(TIMEOUT_S) for future in futures]


def by_memory(size: int) -> Callable[[int], Group]:
    memory = mmap.mmap(-1, memory_bytes(size))
    return lambda rank: SharedMemoryGroup(memory, rank, size, is_hasty=False)


def by_gloo(size: int, scratch: Path) -> Callable[[int], Group]:
    return lambda rank: GlooGroup(scratch / "meeting", rank, size)


def numbers(rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("transport", ["memory", "gloo"])
def test_all_ranks_get_the_same(tmp_path: Path, transport: str, size: int) -> None:
    shapes = [(1, 1), (3, 5), (7, 1000), (2, SLOT_BYTES // 4 + 3)]  # the last one goes in pieces

    def work(group: Group) -> list[Any]:
        found: list[Any] = []
        for shape in shapes * 3:
            found.append(group.all_reduce(numbers(group.rank, *shape)))
            found.append(torch.stack(group.all_gather(numbers(group.rank, *shape))))
            parts = group.gather(numbers(group.rank, *shape))
            assert (parts is None) == (group.rank > 0)
            found.append(None if parts is None else torch.stack(parts))
        turned = numbers(group.rank, 4, 6).t()  # not contiguous: changed in place all the same
        assert group.all_reduce(turned) is turned
        return [*found, turned]

    make = by_memory(size) if transport == "memory" else by_gloo(size, tmp_path)
    ranks = together(size, make, work)
    for shape, (summed, gathered, at_first) in zip(
        shapes * 3, zip(*[iter(ranks[0])] * 3, strict=False), strict=True
    ):
        each = torch.stack([numbers(rank, *shape) for rank in range(size)])
        assert torch.equal(gathered, each)
        assert torch.equal(at_first, each)
        assert torch.allclose(summed, each.sum(0), atol=1e-5)
    for other in ranks[1:]:
        for mine, theirs in zip(ranks[0], other, strict=True):
            assert theirs is None or torch.equal(mine, theirs), "to the last bit"


def test_sums_are_made_in_the_order_of_the_ranks() -> None:
    """Whoever comes first: 1e8 + 1 - 1e8 is 0 in float32, and 1e8 - 1e8 + 1 is not."""
    values = [1e8, 1.0, -1e8]
    ranks = together(
        3, by_memory(3), lambda group: group.all_reduce(torch.tensor([values[group.rank]]))
    )
    assert [float(rank) for rank in ranks] == [0.0] * 3


def test_half_precision_and_nothing_at_all() -> None:
    def work(group: Group) -> tuple[Any, ...]:
        half = group.all_reduce(torch.full((5,), 1.5, dtype=torch.bfloat16))
        return half.tolist(), group.all_reduce(torch.empty(0, 8)).shape

    assert together(2, by_memory(2), work) == [([3.0] * 5, (0, 8))] * 2


def test_a_group_of_one_gives_back_what_it_got() -> None:
    x = torch.ones(3)
    assert ALONE.all_reduce(x) is x
    assert ALONE.all_gather(x)[0] is x
    found = ALONE.gather(x)
    assert found is not None
    assert found[0] is x
