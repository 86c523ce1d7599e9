"""The pool of blocks: owners, the prefix index, and what is evicted first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core.blocks import BlockName, BlockPool
from scheduler.core.prefix import HashChain, block_hash, root_hash
from scheduler.core.table import BlockTable


def name(text: str) -> BlockName:
    return BlockName(0, text.encode())


def test_blocks_go_out_and_come_back() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    assert pool.num_free == 1
    pool.check_integrity({first: 1, second: 1})
    pool.release([first, second])
    assert pool.num_free == 3
    assert pool.num_cached == 0


def test_a_named_block_is_found_after_its_owner_is_gone() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.register(name("a"), block)
    pool.release([block])
    assert pool.lookup(name("a")) == block
    assert (pool.num_free, pool.num_cached) == (2, 1)
    pool.share(block)
    assert (pool.num_free, pool.num_cached) == (1, 0)


def test_blank_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.register(name("a"), block)
    pool.release([block])
    assert pool.allocate(1) != [block]
    assert pool.lookup(name("a")) == block


def test_the_block_released_first_is_evicted_first() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for text, block in zip("abc", blocks, strict=True):
        pool.register(name(text), block)
    pool.release(reversed(blocks))
    pool.allocate(1)
    assert pool.lookup(name("c")) is None
    assert pool.lookup(name("a")) == blocks[0]


def test_a_reused_block_loses_its_name() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.register(name("a"), block)
    pool.release([block])
    assert pool.allocate(1) == [block]
    assert pool.lookup(name("a")) is None
    pool.check_integrity({block: 1})


def test_of_equal_blocks_the_first_stays_known() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(name("a"), first)
    pool.register(name("a"), second)
    assert pool.lookup(name("a")) == first
    pool.release([second])
    assert (pool.num_free, pool.num_cached) == (1, 0)


def test_a_forgotten_block_stays_with_its_owners() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.register(name("a"), block)
    pool.forget(block)
    assert pool.lookup(name("a")) is None
    assert pool.num_owners(block) == 1
    pool.release([block])
    assert (pool.num_free, pool.num_cached) == (1, 0)


def test_a_second_release_is_a_bug() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)


def test_integrity_names_the_leak() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="owners of blocks"):
        pool.check_integrity({})


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=60))
def test_the_pool_is_whole_after_any_history(history: list[tuple[int, int]]) -> None:
    pool, owned = BlockPool(6), []
    for action, number in history:
        if action == 0 and pool.num_free:
            owned += pool.allocate(1)
        elif action == 1 and owned:
            pool.release([owned.pop(number % len(owned))])
        elif action == 2 and owned:
            pool.register(name(str(number)), owned[number % len(owned)])
        elif (block := pool.lookup(name(str(number)))) is not None:
            pool.share(block)
            owned.append(block)
        pool.check_integrity({block: owned.count(block) for block in owned})


def test_a_table_tells_each_block_once_and_all_when_asked() -> None:
    pool, table = BlockPool(4), BlockTable()
    table.grow(pool, 2)
    (whole,) = table.take_updates(whole=True)
    assert (whole.first_index, len(whole.block_ids)) == (0, 2)
    assert table.take_updates(whole=False) == ()
    table.grow(pool, 3)
    (new,) = table.take_updates(whole=False)
    assert (new.first_index, new.block_ids) == (2, (table.groups[0][2],))
    (again,) = table.take_updates(whole=True)
    assert again.block_ids == tuple(table.groups[0])
    table.release(pool)
    assert pool.num_free == 4


def test_every_cache_group_has_blocks_of_its_own() -> None:
    pool, table = BlockPool(6), BlockTable(num_groups=2)
    table.grow(pool, 3)
    assert pool.num_free == 0
    assert sorted(table.block_ids()) == list(range(6))
    assert len(table.take_updates(whole=False)) == 2


def test_a_name_depends_on_model_adapter_salt_length_parent_and_tokens() -> None:
    roots = {
        root_hash("m", "", "", 0),
        root_hash("n", "", "", 0),
        root_hash("m", "a", "", 0),
        root_hash("m", "", "a", 0),
        root_hash("", "m", "", 0),
        root_hash("m", "", "", 9),
    }
    assert len(roots) == 6
    names = {block_hash(root, (1, 2)) for root in roots} | {block_hash(b"", (2, 1))}
    assert len(names) == 7


def test_a_chain_computes_each_name_once_and_follows_growth() -> None:
    tokens = [1, 2, 3, 4]
    chain = HashChain(root_hash("m", "", "", 0), 2)
    two = list(chain.extend(tokens, 2))
    tokens += [5, 6]
    assert chain.extend(tokens, 3)[:2] == two
    other = HashChain(root_hash("m", "", "", 0), 2).extend([9, 9, 3, 4], 2)
    assert other[1] != two[1]
