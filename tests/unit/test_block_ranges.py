"""Where a pipeline's blocks lie in a worker's memory, and when two pipelines are in one's way."""

from __future__ import annotations

import pytest

from stage_worker.block_ranges import BlockRange, PipelineBlocks
from stagemesh.errors import ProtocolError

NUM_BLOCKS, NUM_LOGGED = 10, 6


def blocks(
    num_blocks: int, *, from_end: bool = False, num_log_blocks: int | None = None
) -> PipelineBlocks:
    return PipelineBlocks.at_end(
        NUM_BLOCKS,
        NUM_LOGGED,
        num_blocks=num_blocks,
        from_end=from_end,
        num_log_blocks=num_log_blocks,
    )


@pytest.mark.parametrize("from_end", [False, True])
@pytest.mark.parametrize("num_blocks", [1, 4, NUM_BLOCKS])
def test_ids_fill_the_range_whatever_its_size(num_blocks: int, from_end: bool) -> None:
    some = BlockRange(NUM_BLOCKS, num_blocks, from_end)
    places = some.places(range(num_blocks))
    assert sorted(places) == list(range(some.start, some.end))
    assert places == BlockRange(NUM_BLOCKS, NUM_BLOCKS, from_end).places(range(num_blocks))
    assert places[0] == (NUM_BLOCKS - 1 if from_end else 0)


def test_two_ranges_meet_where_a_block_is_in_both() -> None:
    for num_first in range(NUM_BLOCKS + 1):
        for num_last in range(NUM_BLOCKS + 1):
            first = BlockRange(NUM_BLOCKS, num_first, False)
            last = BlockRange(NUM_BLOCKS, num_last, True)
            common = set(first.places(range(num_first))) & set(last.places(range(num_last)))
            assert first.meets(last) == last.meets(first) == bool(common)
            left = first.beside(last)
            assert not left.meets(last)
            assert left.num_blocks == num_first - len(common)


def test_the_lowest_ids_are_logged() -> None:
    assert blocks(10).log.num_blocks == NUM_LOGGED
    assert blocks(4).log.num_blocks == 4
    assert blocks(10, num_log_blocks=3).num_logged((0, 2, 3, 9)) == 2
    assert blocks(4, from_end=True).log.places(range(4)) == [5, 4, 3, 2]
    assert blocks(2, num_log_blocks=6).log.num_blocks == 2
    assert blocks(10, num_log_blocks=0).num_logged(range(10)) == 0


def test_logs_can_meet_where_the_kv_does_not() -> None:
    assert blocks(5).meets(blocks(5, from_end=True))
    for num_log_blocks, in_the_way in ((1, False), (2, True)):
        other = blocks(5, from_end=True, num_log_blocks=num_log_blocks)
        assert blocks(5).meets(other) == other.meets(blocks(5)) == in_the_way
    left = blocks(10).beside(blocks(3, from_end=True, num_log_blocks=2))
    assert (left.kv.num_blocks, left.log.num_blocks) == (7, 4)


def test_blocks_that_are_not_there() -> None:
    for wrong in (0, NUM_BLOCKS + 1):
        with pytest.raises(ProtocolError, match=f"has {wrong} blocks, this stage 10"):
            blocks(wrong)
    with pytest.raises(ProtocolError, match="7 blocks cannot be logged here, 6 can"):
        blocks(10, num_log_blocks=7)
    assert blocks(4).order((3, 0, 3)) == (0, 3)
    with pytest.raises(ProtocolError, match="4 blocks here"):
        blocks(4).order((4, 0))
