"""Triton kernel: attention of rows with one query each over paged KV, split over the context.

    R rows, H query heads, K KV heads, G = H / K, D head dim
    O offset in a block, M entries of all block tables, one after another
    W items: pieces of contexts, so many that they fill the device

A program takes one item and one KV head, reads the item's pages through the row's block table, and
keeps a running maximum and sum (online softmax, arXiv 1805.02867). Whoever is the last of a row's
items to end puts the row together. Slots beyond an item are never read, so what they hold does not
matter. What the items are is planned elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634
_MERGED_ITEMS = 8


@triton.jit
def _attend_item(
    query,
    keys,
    values,
    table,
    begin,
    end,
    kv_head,
    scale,
    KV_STRIDE: tl.constexpr,
    D: tl.constexpr,
    O: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Maximum [BLOCK_G], sum [BLOCK_G] and weighted values [BLOCK_G, BLOCK_D] of one item."""
    dims = tl.arange(0, BLOCK_D)
    highest = tl.full([BLOCK_G], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    sums = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in tl.range(begin, end, TILE):
        positions = start + tl.arange(0, TILE)
        live = positions < end
        blocks = tl.load(table + positions // O, mask=live, other=0)
        slots = blocks.to(tl.int64) * O + positions % O
        at = slots[:, None] * KV_STRIDE + kv_head * D + dims[None, :]
        seen = live[:, None] & (dims < D)[None, :]
        key = tl.load(keys + at, mask=seen, other=0.0)
        value = tl.load(values + at, mask=seen, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(live[None, :], scores, -float("inf"))
        raised = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - raised[:, None])
        shrink = tl.exp2(highest - raised)
        total = total * shrink + tl.sum(weights, 1)
        weighted = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        sums = sums * shrink[:, None] + weighted
        highest = raised
    return highest, total, sums


@triton.jit
def _merge(
    partials,
    summits,
    first,
    num_items,
    kv_head,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_GD: tl.constexpr,
    NUM: tl.constexpr,
):
    """[BLOCK_GD]: the heads of one KV head, put together from items [first, first + num_items)."""
    columns = tl.arange(0, BLOCK_GD)
    highest = tl.full([BLOCK_GD], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_GD], tl.float32)
    sums = tl.zeros([BLOCK_GD], tl.float32)
    for start in tl.range(0, num_items, NUM):
        which = start + tl.arange(0, NUM)
        item = (first + which).to(tl.int64)[:, None]
        seen = (which < num_items)[:, None] & (columns < G * D)[None, :]
        at = (item * H + kv_head * G + (columns // D)[None, :]) * 2
        # .cg: what other programs stored is in the second level of cache, not in the first.
        peak = tl.load(summits + at, mask=seen, other=-float("inf"), cache_modifier=".cg")
        share = tl.load(summits + at + 1, mask=seen, other=0.0, cache_modifier=".cg")
        at = (item * H + kv_head * G) * D + columns[None, :]
        part = tl.load(partials + at, mask=seen, other=0.0, cache_modifier=".cg")
        raised = tl.maximum(highest, tl.max(peak, 0))
        shrink, weight = tl.exp2(highest - raised), tl.exp2(peak - raised[None, :])
        total = total * shrink + tl.sum(share * weight, 0)
        sums = sums * shrink + tl.sum(part * weight, 0)
        highest = raised
    return sums / total


@triton.jit
def _decode(
    queries,  # [R, H, D], a row's at a distance of `query_stride`
    keys,  # [N * O, K, D]
    values,
    tables,  # [M] int32
    offsets,  # [R] int32: where each row's table begins
    items,  # [W, 4] int32: row or -1, first position, end, number of the row's items
    firsts,  # [R] int32: the first item of each row
    partials,  # [W, H, D] float32
    summits,  # [W, H, 2] float32: maximum and sum
    counters,  # [R, K] int32, zero before and after
    output,  # [R, H, D]
    scale,
    query_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    O: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_GD: tl.constexpr,
    TILE: tl.constexpr,
    NUM_MERGED: tl.constexpr,
):
    item, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.load(items + item * 4)
    if row < 0:
        return
    begin = tl.load(items + item * 4 + 1)
    end = tl.load(items + item * 4 + 2)
    num_items = tl.load(items + item * 4 + 3)
    group, dims = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    heads = kv_head * G + group
    own = (group < G)[:, None] & (dims < D)[None, :]
    at = row.to(tl.int64) * query_stride + heads[:, None] * D + dims[None, :]
    query = tl.load(queries + at, mask=own, other=0.0)
    table = tables + tl.load(offsets + row)
    highest, total, sums = _attend_item(
        query, keys, values, table, begin, end, kv_head, scale,
        H // G * D, D, O, BLOCK_G, BLOCK_D, TILE,
    )  # fmt: skip
    if num_items == 1:
        at = (row.to(tl.int64) * H + heads[:, None]) * D + dims[None, :]
        tl.store(output + at, (sums / total[:, None]).to(output.dtype.element_ty), mask=own)
        return
    at = item.to(tl.int64) * H + heads
    tl.store(partials + at[:, None] * D + dims[None, :], sums, mask=own)
    tl.store(summits + at * 2, highest, mask=group < G)
    tl.store(summits + at * 2 + 1, total, mask=group < G)
    tl.debug_barrier()  # what all threads stored comes before the count
    counter = counters + row * (H // G) + kv_head
    if tl.atomic_add(counter, 1, sem="acq_rel") == num_items - 1:
        merged = _merge(
            partials, summits, tl.load(firsts + row), num_items, kv_head,
            H, G, D, BLOCK_GD, NUM_MERGED,
        )  # fmt: skip
        columns = tl.arange(0, BLOCK_GD)
        to = (row.to(tl.int64) * H + kv_head * G) * D + columns
        tl.store(output + to, merged.to(output.dtype.element_ty), mask=columns < G * D)
        tl.store(counter, 0)


def decode_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    offsets: Tensor,
    items: Tensor,
    firsts: Tensor,
    scratch: tuple[Tensor, Tensor, Tensor],
    output: Tensor,
) -> None:
    """queries: [R, H, D]; keys, values: [N, O, K, D] -> output: [R, H, D], of rows with items.

    Tables to firsts are as the kernel has them; scratch is what `decode_scratch` made.
    """
    _, num_heads, head_dim = queries.shape
    _, block_size, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    partials, summits, counters = scratch
    grid: Any = (items.shape[0], num_kv_heads)
    _decode[grid](
        queries,
        keys,
        values,
        tables,
        offsets,
        items,
        firsts,
        partials,
        summits,
        counters,
        output,
        head_dim**-0.5 * _LOG2_E,
        queries.stride(0),
        H=num_heads,
        G=group,
        D=head_dim,
        O=block_size,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_GD=triton.next_power_of_2(group * head_dim),
        TILE=_tile_tokens(head_dim, queries.itemsize),
        NUM_MERGED=_MERGED_ITEMS,
        num_warps=4,
        num_stages=2,
    )


def _tile_tokens(head_dim: int, item_bytes: int) -> int:
    """Positions that a program reads at once: what shared memory has room for."""
    head_bytes = triton.next_power_of_2(head_dim) * item_bytes
    return 128 if head_bytes <= 256 else 64 if head_bytes <= 512 else 32


def decode_scratch(
    num_items: int, num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Partial results, their maxima and sums, and counters at zero."""
    return (
        torch.empty(num_items, num_heads, head_dim, device=device),
        torch.empty(num_items, num_heads, 2, device=device),
        torch.zeros(num_rows, num_kv_heads, dtype=torch.int32, device=device),
    )
