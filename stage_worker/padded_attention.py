"""Attention that gathers contexts: rows padded to one another, and a kernel for each group of them.

    T tokens of the step, R rows of a group, n queries per row, C context slots, W window
    H query heads, K KV heads, G = H / K, D head dim

Rows with equally many queries and contexts of similar length form a group, padded to its longest
context. A padded slot repeats a slot of its own sequence, so that no query ever reads a value of
another sequence or of a stale page. Every layer copies the contexts: right for short ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stage_worker.attention import PLAIN_SCORES, Query, Scores
from stage_worker.kv_cache import KvCache


@dataclass(frozen=True, slots=True)
class Group:
    """tokens: [R, n] index into the step's; slots: [R, C]; mask: [R, n, C], true where read."""

    tokens: Tensor
    slots: Tensor
    mask: Tensor


class GroupKernel(Protocol):
    def __call__(
        self,
        group: Group,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scores: Scores,
        sinks: Tensor | None,
    ) -> Tensor:
        """queries: [R, n, H, D]; keys, values: [R, C, K, D]; sinks: [H] -> [R, n, H, D]."""
        ...


class PaddedAttention:
    """An `Attention`; contexts start and end at multiples of `tile`."""

    def __init__(self, kernel: GroupKernel, tile: int, scores: Scores = PLAIN_SCORES) -> None:
        self._kernel = kernel
        self._tile = tile
        self._scores = scores

    def plan(self, rows: Sequence[Query], window: int | None, cache: KvCache) -> list[Group]:
        return plan_groups(rows, window, self._tile)

    def attend(
        self,
        queries: Tensor,
        plan: list[Group],
        cache: KvCache,
        layer: int,
        sinks: Tensor | None = None,
    ) -> Tensor:
        output = torch.empty_like(queries)
        for group in plan:
            keys, values = cache.read(layer, group.slots)
            own = queries[group.tokens]
            output[group.tokens] = self._kernel(group, own, keys, values, self._scores, sinks)
        return output.flatten(1)


def plan_groups(rows: Sequence[Query], window: int | None, tile: int) -> list[Group]:
    """Groups for layers with this window; contexts start and end at multiples of `tile`."""
    buckets: dict[tuple[int, int], list[tuple[Query, int]]] = defaultdict(list)
    for row in rows:
        begin = 0 if window is None else max(0, row.start - window + 1) // tile * tile
        length = row.end - begin
        buckets[row.num_tokens, length.bit_length()].append((row, begin))
    return [_plan_group(members, window, tile) for members in buckets.values()]


def _plan_group(members: Sequence[tuple[Query, int]], window: int | None, tile: int) -> Group:
    device = members[0][0].slots.device
    longest = max(row.end - begin for row, begin in members)
    context = -(-longest // tile) * tile
    slots = torch.stack([_padded(row.slots[begin:], context) for row, begin in members])
    firsts = torch.tensor([row.first for row, _ in members], device=device)
    starts = torch.tensor([row.start for row, _ in members], device=device)
    begins = torch.tensor([begin for _, begin in members], device=device)
    steps = torch.arange(members[0][0].num_tokens, device=device)
    query_positions = (starts[:, None] + steps)[:, :, None]
    key_positions = (begins[:, None] + torch.arange(context, device=device))[:, None, :]
    mask = key_positions <= query_positions
    if window is not None:
        mask &= key_positions > query_positions - window
    return Group(tokens=firsts[:, None] + steps, slots=slots, mask=mask)


def _padded(slots: Tensor, length: int) -> Tensor:
    return torch.cat((slots, slots[-1:].expand(length - slots.shape[0])))


def fast_kernel(
    group: Group,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scores: Scores,
    sinks: Tensor | None = None,
) -> Tensor:
    """torch's fused kernel, which knows no cap and no sinks. With one query a row, the query heads
    of a KV head are its queries."""
    assert scores.cap is None
    assert sinks is None
    _, num_queries, num_heads, head_dim = queries.shape
    keys, values, mask = keys.transpose(1, 2), values.transpose(1, 2), group.mask[:, None]
    if num_queries == 1:
        grouped = queries.reshape(len(queries), keys.shape[1], -1, head_dim)
        mask = mask.expand(-1, -1, grouped.shape[2], -1)
        output = torch.nn.functional.scaled_dot_product_attention(
            grouped, keys, values, mask, scale=scores.scale
        )
        return output.reshape(-1, 1, num_heads, head_dim)
    return torch.nn.functional.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys,
        values,
        mask,
        scale=scores.scale,
        enable_gqa=keys.shape[1] != num_heads,
    ).transpose(1, 2)
