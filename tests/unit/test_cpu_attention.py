"""Attention over paged KV on the CPU is that of each query over its own positions, however blocks
lie; what belongs to nobody, or to another, is NaN here."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import stage_worker.capped_attention as capped_attention
import stage_worker.cpu_attention as cpu_attention
from stage_worker.attention import PLAIN_SCORES, Attention, Query, Scores
from stage_worker.attention_parts import Gathered, Part, Stretch
from stage_worker.block_runs import Run, runs_of
from stage_worker.cpu_attention import CpuAttention
from stage_worker.invariant_attention import TILE, invariant_kernel
from stage_worker.kv_cache import KvCache, PlainKvCache
from stage_worker.packed_kv_cache import PackedKvCache
from stage_worker.padded_attention import PaddedAttention, fast_kernel
from stagemesh.model_spec import ModelSpec

BLOCK = 4
NUM_BLOCKS = 400
KV_HEADS, HEADS, HEAD_DIM = 2, 6, 16
SLOT_BYTES = 2 * KV_HEADS * HEAD_DIM * 4
# Tokens of each row and where it starts: decode, verification of drafts, chunks.
ROWS = [(1, 0), (1, 150), (70, 0), (1, 151), (5, 33), (5, 60), (1, 7), (66, 40), (1, 199)]


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (0, 16, [(8, 16), (36, 44)]),  # blocks 9, 2, 10, 3
        (0, 14, [(8, 14), (36, 44)]),  # the last block in part
        (2, 16, [(8, 16), (38, 44)]),  # the first one
        (2, 7, [(8, 11), (38, 40)]),
        (5, 7, [(9, 11)]),
        (4, 5, [(8, 9)]),
        (4, 8, [(8, 12)]),
        (3, 3, []),
    ],
)
def test_runs(begin: int, end: int, expected: list[tuple[int, int]]) -> None:
    assert runs_of([9, 2, 10, 3, 77], begin, end, BLOCK) == [Run(*run) for run in expected]


def test_runs_of_falling_blocks() -> None:
    assert runs_of([7, 6, 5], 0, 12, BLOCK) == [Run(20, 32)]
    assert runs_of([7, 6, 5], 0, 9, BLOCK) == [Run(20, 21), Run(24, 32)]


def _rising() -> list[int]:
    return list(range(NUM_BLOCKS))


def _shuffled() -> list[int]:
    return random.Random(5).sample(range(NUM_BLOCKS), NUM_BLOCKS)


def _in_pieces() -> list[int]:
    pieces = [list(range(i, i + 10)) for i in range(0, NUM_BLOCKS, 10)]
    return [block for piece in random.Random(6).sample(pieces, len(pieces)) for block in piece]


ORDERS = {
    "rising": _rising,
    "falling": lambda: _rising()[::-1],
    "shuffled": _shuffled,
    "pieces": _in_pieces,
}


SPEC = cast(ModelSpec, SimpleNamespace(num_kv_heads=KV_HEADS, head_dim=HEAD_DIM))
CPU = torch.device("cpu")


@pytest.fixture
def cache() -> PlainKvCache:
    cache = PlainKvCache(SPEC, 2, NUM_BLOCKS, BLOCK, torch.float32, CPU)
    for pages in cache.memory:
        pages.fill_(torch.nan)
    return cache


@pytest.fixture(params=["bfloat16", "float16", "int8"])
def packed(request: pytest.FixtureRequest) -> PackedKvCache:
    cache = PackedKvCache(SPEC, 2, NUM_BLOCKS, BLOCK, torch.float32, request.param)
    for pages in cache.memory:
        pages.fill_(-1)  # NaN as any of these
    return cache


@pytest.fixture(params=[0, 20, 10**6], ids=["all runs", "long runs", "gathered"])
def min_run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """In slots."""
    monkeypatch.setattr(cpu_attention, "_RUN_BYTES", request.param * SLOT_BYTES)
    monkeypatch.setattr(cpu_attention, "_MERGE_SLOTS", 0)
    return request.param


def make_rows(cache: KvCache, blocks: list[int], sizes: list[tuple[int, int]]) -> list[Query]:
    """Rows whose blocks come from `blocks` in turn, with their keys and values written."""
    rows, first = [], 0
    for num_tokens, start in sizes:
        end = start + num_tokens
        own = [blocks.pop(0) for _ in range(-(-end // BLOCK) + 1)]  # one for what comes later
        slots = (torch.tensor(own)[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:end]
        for layer in range(2):
            keys, values = torch.randn(2, end, KV_HEADS, HEAD_DIM)
            cache.write(layer, slots, keys, values)
        rows.append(Query(first, num_tokens, start, slots, own))
        first += num_tokens
    return rows


def plain(
    queries: Tensor,
    rows: list[Query],
    window: int | None,
    cache: KvCache,
    scores: Scores = PLAIN_SCORES,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition, in float64, query by query. [T, H, D] -> [T, H * D] of layer 1."""
    output = torch.empty_like(queries)
    for row in rows:
        for i in range(row.num_tokens):
            end = row.start + i + 1
            slots = row.slots[0 if window is None else max(0, end - window) : end]
            keys, values = (
                held[0].repeat_interleave(HEADS // KV_HEADS, dim=1).double()
                for held in cache.read(1, slots[None])
            )
            products = torch.einsum("hd,chd->hc", queries[row.first + i].double(), keys)
            products *= HEAD_DIM**-0.5 if scores.scale is None else scores.scale
            if scores.cap is not None:
                products = scores.cap * torch.tanh(products / scores.cap)
            if sinks is not None:
                products = torch.cat((products, sinks[:, None].double()), dim=1)
            weights = products.softmax(dim=1)[:, : len(slots)]
            output[row.first + i] = torch.einsum("hc,chd->hd", weights, values)
    return output.flatten(1)


def attended(
    attention: Attention[Any],
    rows: list[Query],
    window: int | None,
    cache: KvCache,
    scores: Scores = PLAIN_SCORES,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What comes out, and what should."""
    queries = torch.randn(rows[-1].first + rows[-1].num_tokens, HEADS, HEAD_DIM)
    output = attention.attend(queries, attention.plan(rows, window, cache), cache, 1, sinks)
    return output, plain(queries, rows, window, cache, scores, sinks)


@pytest.mark.parametrize("max_bytes", [1, 2**21])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("scores", [Scores(0.4, 1.5), Scores(0.4), Scores(None, 0.7)], ids=str)
def test_scores_are_scaled_and_capped(
    cache: KvCache,
    min_run: int,
    scores: Scores,
    window: int | None,
    max_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the kernel of the CPU, queries by queries where memory is short, and the invariant one."""
    torch.manual_seed(3)
    monkeypatch.setattr(capped_attention, "_MAX_SCORE_BYTES", max_bytes)
    rows = make_rows(cache, _in_pieces(), ROWS)
    for attention in (CpuAttention(scores), PaddedAttention(invariant_kernel, TILE, scores)):
        output, expected = attended(attention, rows, window, cache, scores)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


# One that leaves nothing of a head, and one that takes nothing.
SINKS = torch.tensor([0.3, -1.2, 300.0, 2.5, -300.0, 1.0])


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("scores", [PLAIN_SCORES, Scores(0.4, 1.5)], ids=str)
def test_sinks_take_their_share(
    cache: KvCache, min_run: int, scores: Scores, window: int | None
) -> None:
    """By either kernel, whether a query's results are of one part or merged."""
    torch.manual_seed(4)
    rows = make_rows(cache, _in_pieces(), ROWS)
    for attention in (CpuAttention(scores), PaddedAttention(invariant_kernel, TILE, scores)):
        output, expected = attended(attention, rows, window, cache, scores, SINKS)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_sinks_beside_pages_in_another_type(packed: PackedKvCache) -> None:
    torch.manual_seed(5)
    for rows in (make_rows(packed, _shuffled(), ROWS), make_rows(packed, _rising(), [(1, 99)])):
        output, expected = attended(CpuAttention(), rows, 50, packed, sinks=SINKS)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("window", [None, 1, 50, 1000])
def test_attention_over_any_table(
    cache: KvCache, min_run: int, order: str, window: int | None
) -> None:
    torch.manual_seed(len(order))
    rows = make_rows(cache, ORDERS[order](), ROWS)
    output, expected = attended(CpuAttention(), rows, window, cache)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 50])
def test_padded_attention(cache: KvCache, window: int | None) -> None:
    torch.manual_seed(1)
    rows = make_rows(cache, _shuffled(), ROWS)
    output, expected = attended(PaddedAttention(fast_kernel, 1), rows, window, cache)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_scores_too_large_for_exp(cache: PlainKvCache, min_run: int) -> None:
    """Parts whose sums differ by more than float32 can hold are merged all the same."""
    rows = make_rows(cache, _in_pieces(), [(1, 199), (1, 90)])
    cache.keys[1] *= 100
    output, expected = attended(CpuAttention(), rows, None, cache)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


def parts_of(cache: KvCache, rows: list[Query], window: int | None = None) -> list[Part]:
    return list(CpuAttention().plan(rows, window, cache).parts)


def test_long_runs_are_read_in_place(cache: KvCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "_RUN_BYTES", 100 * SLOT_BYTES)
    rising = make_rows(cache, _rising(), [(1, 199), (1, 149), (1, 39), (1, 41)])
    long, longer, short = parts_of(cache, rising)
    assert long == Stretch(range(1), Run(0, 200))
    assert longer == Stretch(range(1, 2), Run(51 * BLOCK, 51 * BLOCK + 150))
    assert isinstance(short, Gathered)
    assert sorted(short.tokens) == [2, 3]
    assert isinstance(parts_of(cache, rising, window=20)[0], Gathered)
    falling = make_rows(cache, _rising()[::-1], [(1, 199)])
    assert parts_of(cache, falling) == [Stretch(range(1), Run(350 * BLOCK, 400 * BLOCK))]
    pieces = make_rows(cache, _in_pieces(), [(1, 199), (1, 199)])
    assert [type(part) for part in parts_of(cache, pieces)] == [Gathered]


def test_a_lone_run_is_read_in_place(cache: KvCache) -> None:
    assert isinstance(parts_of(cache, make_rows(cache, _rising(), [(1, 9)]))[0], Stretch)
    assert isinstance(parts_of(cache, make_rows(cache, _shuffled(), [(1, 9)]))[0], Gathered)


def test_padding_is_bounded(cache: KvCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short contexts share a group up to where padding would cost more than another group."""
    rows = make_rows(cache, _rising(), [(1, 199), (1, 3), (1, 150), (1, 5)])
    assert [sorted(part.tokens) for part in parts_of(cache, rows)] == [[0, 1, 2, 3]]
    monkeypatch.setattr(cpu_attention, "_GROUP_BYTES", 100 * SLOT_BYTES)
    assert [sorted(part.tokens) for part in parts_of(cache, rows)] == [[0, 2], [1, 3]]


@pytest.mark.parametrize("window", [None, 50])
def test_contexts_are_copied_in_pieces(
    cache: KvCache, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    monkeypatch.setattr(cpu_attention, "_MAX_COPY_BYTES", 30 * SLOT_BYTES)
    torch.manual_seed(2)
    rows = make_rows(cache, _shuffled(), ROWS)
    output, expected = attended(CpuAttention(), rows, window, cache)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_pieces_are_bounded(cache: KvCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "_MAX_COPY_BYTES", 30 * SLOT_BYTES)
    rows = make_rows(cache, _shuffled(), [(1, 199), (1, 9), (1, 8), (1, 7)])
    sizes = [part.slots.numel() for part in parts_of(cache, rows) if isinstance(part, Gathered)]
    assert sum(sizes) >= 200 + 10 + 9 + 8
    assert max(sizes) <= 30


def test_a_second_reading_may_be_longer_or_shorter(cache: KvCache) -> None:
    rows = make_rows(cache, _rising(), [(1, 100)])
    for slots in (rows[0].slots[:5], rows[0].slots, rows[0].slots[40:60].view(4, 5)):
        for copied, pages in zip(cache.read(1, slots), (cache.keys, cache.values), strict=True):
            assert torch.equal(copied, pages[1].flatten(0, 1)[slots])


@pytest.mark.parametrize("order", ["rising", "shuffled"])
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("piece", [8, 64])
def test_pages_in_another_type(
    packed: PackedKvCache,
    order: str,
    window: int | None,
    piece: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Attention is exact over what the pages hold, however it is cut."""
    monkeypatch.setattr(cpu_attention, "_PIECE_SLOTS", piece)
    torch.manual_seed(piece)
    rows = make_rows(packed, ORDERS[order](), ROWS)
    output, expected = attended(CpuAttention(), rows, window, packed)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_a_context_in_another_type_is_turned_a_piece_at_a_time(
    packed: PackedKvCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention, "_PIECE_SLOTS", 16)
    monkeypatch.setattr(cpu_attention, "_MAX_COPY_BYTES", 64 * packed.slot_bytes)
    rows = make_rows(packed, _rising(), [(1, 199), (1, 190), (5, 150), (70, 300)])
    parts = parts_of(packed, rows)
    made = {}
    for part in parts:
        assert isinstance(part, Gathered)
        num_queries = len(part.tokens) // len(part.slots)
        made[num_queries] = max(made.get(num_queries, 0), part.slots.numel())
    # Few queries: as many slots as a part holds. Many: four for each, or their own tokens.
    assert made == {1: 64, 5: 60, 70: 280}
    assert sum(isinstance(part, Gathered) and not part.causal for part in parts) > 10
