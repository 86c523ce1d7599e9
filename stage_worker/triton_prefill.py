"""Triton kernel: causal attention of rows with several queries each over paged KV.

    T tokens, R rows, H query heads, K KV heads, G = H / K, D head dim
    O offset in a block, M entries of all block tables, one after another
    M queries of a program: M / G tokens of a row, each with the G heads of one KV head

A program takes some tokens of one row and one KV head, and walks through what they see: first the
pages that all of its queries see whole, then those where a mask decides. Slots that none of its
queries sees are never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634


@triton.jit
def _walk(
    highest, total, sums, query, last_seen, keys, values, table, begin, end, window, kv_head, scale,
    KV_STRIDE: tl.constexpr, D: tl.constexpr, O: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Goes on with positions [begin, end); those after `last_seen` [M] or out of the window are
    masked."""
    dims = tl.arange(0, BLOCK_D)
    for start in tl.range(begin, end, TILE):
        positions = start + tl.arange(0, TILE)
        live = positions < end
        blocks = tl.load(table + positions // O, mask=live, other=0)
        slots = blocks.to(tl.int64) * O + positions % O
        at = slots[:, None] * KV_STRIDE + kv_head * D + dims[None, :]
        seen = live[:, None] & (dims < D)[None, :]
        key = tl.load(keys + at, mask=seen, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if MASKED:
            visible = live[None, :] & (positions[None, :] <= last_seen[:, None])
            if WINDOWED:
                visible = visible & (positions[None, :] > last_seen[:, None] - window)
            scores = tl.where(visible, scores, -1e38)
        raised = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - raised[:, None])
        if MASKED:
            weights = tl.where(visible, weights, 0.0)
        shrink = tl.exp2(highest - raised)
        total = total * shrink + tl.sum(weights, 1)
        value = tl.load(values + at, mask=seen, other=0.0)
        weighted = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        sums = sums * shrink[:, None] + weighted
        highest = raised
    return highest, total, sums


@triton.jit
def _prefill(
    queries,  # [T, H, D], a token's at a distance of `query_stride`
    keys,  # [N * O, K, D]
    values,
    tables,  # [M] int32
    offsets,  # [R] int32: where each row's table begins
    tiles,  # [P, 4] int32: row, first token, its position, number of tokens
    output,  # [T, H, D]
    scale,
    window,
    query_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    O: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.load(tiles + tile * 4)
    first = tl.load(tiles + tile * 4 + 1)
    start = tl.load(tiles + tile * 4 + 2)
    num_tokens = tl.load(tiles + tile * 4 + 3)
    lanes, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    tokens, group = lanes // BLOCK_G, lanes % BLOCK_G
    own = ((tokens < num_tokens) & (group < G))[:, None] & (dims < D)[None, :]
    heads = kv_head * G + group
    at = (first + tokens).to(tl.int64) * query_stride + heads * D
    query = tl.load(queries + at[:, None] + dims[None, :], mask=own, other=0.0)
    last_seen = start + tokens
    table = tables + tl.load(offsets + row)
    highest = tl.full([BLOCK_M], -1e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = start + num_tokens
    kv_stride: tl.constexpr = H // G * D
    if WINDOWED:
        begin = tl.maximum(start - window + 1, 0)
        highest, total, sums = _walk(
            highest, total, sums, query, last_seen, keys, values, table, begin, end, window,
            kv_head, scale, kv_stride, D, O, BLOCK_D, TILE, True, True,
        )  # fmt: skip
    else:
        whole = (start + 1) // TILE * TILE
        highest, total, sums = _walk(
            highest, total, sums, query, last_seen, keys, values, table, 0, whole, window,
            kv_head, scale, kv_stride, D, O, BLOCK_D, TILE, False, False,
        )  # fmt: skip
        highest, total, sums = _walk(
            highest, total, sums, query, last_seen, keys, values, table, whole, end, window,
            kv_head, scale, kv_stride, D, O, BLOCK_D, TILE, True, False,
        )  # fmt: skip
    at = (first + tokens).to(tl.int64) * H * D + heads * D
    result = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(output + at[:, None] + dims[None, :], result.to(output.dtype.element_ty), mask=own)


def prefill_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    window: int | None,
    output: Tensor,
) -> None:
    """queries: [T, H, D]; keys, values: [N, O, K, D] -> output: [T, H, D], of the tiles' tokens."""
    _, num_heads, head_dim = queries.shape
    _, block_size, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    sizes = _Sizes.of(head_dim, queries.itemsize)
    grid: Any = (tiles.shape[0], num_kv_heads)
    _prefill[grid](
        queries,
        keys,
        values,
        tables,
        offsets,
        tiles,
        output,
        head_dim**-0.5 * _LOG2_E,
        window or 0,
        queries.stride(0),
        H=num_heads,
        G=group,
        D=head_dim,
        O=block_size,
        BLOCK_G=triton.next_power_of_2(group),
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_M=sizes.block_m,
        TILE=sizes.tile,
        WINDOWED=window is not None,
        num_warps=sizes.num_warps,
        num_stages=2,
    )


def tokens_per_tile(num_heads: int, num_kv_heads: int, head_dim: int, item_bytes: int) -> int:
    """How many tokens a program takes, at most."""
    block_m = _Sizes.of(head_dim, item_bytes).block_m
    return max(1, block_m // triton.next_power_of_2(num_heads // num_kv_heads))


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What a program has in shared memory at once, and its threads."""

    block_m: int
    tile: int
    num_warps: int

    @classmethod
    def of(cls, head_dim: int, item_bytes: int) -> _Sizes:
        head_bytes = triton.next_power_of_2(head_dim) * item_bytes
        if head_bytes <= 256:
            return cls(128, 128, 8)
        return cls(128, 64, 8) if head_bytes <= 512 else cls(64, 32, 4)
