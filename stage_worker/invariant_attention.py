"""Attention whose bits depend on a query and its context alone: for `batch_invariant`.

    R rows of a group, n queries per row, C context slots, H query heads, K KV heads, G = H / K
    D head dim, S = n * G queries of a KV head padded to blocks of M = QUERY_BLOCK

Every matrix product has the same shape, [M, D] x [D, TILE] and [M, TILE] x [TILE, D], whatever the
batch, and tiles are cut at absolute positions and added in order, with a running maximum and sum
(online softmax, arXiv 1805.02867). A tile in which a query sees nothing changes none of its bits:
it is scaled by exp(0) and nothing is added. A sink is what was seen before the first tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stage_worker.attention import Scores
from stage_worker.capped_attention import cap_in_place
from stage_worker.padded_attention import Group

TILE = 64
QUERY_BLOCK = 8
# Stands for minus infinity where a difference of two of them must not be NaN.
_LOWEST = -3e38
# Queries of one product, at most: bounds the memory of a long chunk's tile.
_MAX_QUERIES = 4096
# Of keys, and of values, that are copied into tiles at a time: 1 MiB, to be in a cache still.
_MAX_TILE_NUMBERS = 2**18


def invariant_kernel(
    group: Group,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scores: Scores,
    sinks: Tensor | None = None,
) -> Tensor:
    """queries: [R, n, H, D]; keys, values: [R, C, K, D], C a multiple of TILE; sinks: [H]."""
    num_rows, num_queries, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[2]
    grouped = queries.view(num_rows, num_queries, num_kv_heads, -1, head_dim)
    mask = group.mask[:, :, None].expand(-1, -1, grouped.shape[3], -1)
    # [R, n, K, G, D] -> [R, K, n * G, D]; one mask for all KV heads.
    grouped = grouped.transpose(1, 2).reshape(num_rows, num_kv_heads, -1, head_dim)
    mask = mask.reshape(num_rows, 1, -1, mask.shape[-1]).expand(-1, num_kv_heads, -1, -1)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    # Without sinks: one that weighs nothing beside any score.
    first = grouped.new_full((num_heads,), _LOWEST) if sinks is None else sinks
    first = first.view(1, num_kv_heads, 1, -1).expand(num_rows, -1, num_queries, -1).flatten(2)
    split = (torch.split(each, _MAX_QUERIES, dim=2) for each in (grouped, mask, first))
    pieces = [
        _attend_tiles(some, keys, values, some_mask, scores, some_first)
        for some, some_mask, some_first in zip(*split, strict=True)
    ]
    output = torch.cat(pieces, dim=2)
    output = output.view(num_rows, num_kv_heads, num_queries, -1, head_dim).transpose(1, 2)
    return output.reshape(num_rows, num_queries, num_heads, head_dim)


def _attend_tiles(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scores: Scores, first: Tensor
) -> Tensor:
    """queries: [R, K, S, D]; keys, values: [R, K, C, D]; mask: [R, K, S, C]; first: [R, K, S]
    -> [R, K, S, D]."""
    num_queries, head_dim = queries.shape[2:]
    padding = -num_queries % QUERY_BLOCK
    queries = torch.nn.functional.pad(queries * scores.factor(head_dim), (0, 0, 0, padding))
    # Padded queries see what the last real one sees, so that they stay finite.
    mask = torch.cat((mask, mask[:, :, -1:].expand(-1, -1, padding, -1)), dim=2)
    num_blocks = queries.shape[2] // QUERY_BLOCK
    blocks = queries.reshape(-1, QUERY_BLOCK, head_dim)
    masks = mask.reshape(-1, QUERY_BLOCK, mask.shape[-1])
    highest = torch.nn.functional.pad(first, (0, padding)).reshape(-1, QUERY_BLOCK, 1)
    total, output = torch.ones_like(highest), torch.zeros_like(blocks)
    # As many tiles at once as memory allows: few queries have many operations to wait for else.
    width = TILE * max(1, _MAX_TILE_NUMBERS // (len(blocks) * TILE * head_dim))
    for start in range(0, keys.shape[2], width):
        seen = masks[:, :, start : start + width].reshape(len(blocks), QUERY_BLOCK, -1, TILE)
        hidden = ~seen.transpose(1, 2)
        tile_keys, tile_values = (
            _tiles(x[:, :, start : start + width], num_blocks) for x in (keys, values)
        )
        num_tiles = hidden.shape[1]
        repeated = blocks[:, None].expand(-1, num_tiles, -1, -1).reshape(-1, *blocks.shape[1:])
        # [R * K * num_blocks, num_tiles, M, TILE]: scores, and then what they weigh.
        weights = torch.bmm(repeated, tile_keys.transpose(1, 2)).view(hidden.shape)
        if scores.cap is not None:
            cap_in_place(weights, scores.cap)
        weights.masked_fill_(hidden, _LOWEST)
        own = weights.amax(dim=-1, keepdim=True)
        raised = torch.cat((highest[:, None], own), dim=1).cummax(dim=1).values
        weights.sub_(raised[:, 1:]).exp_().masked_fill_(hidden, 0.0)
        scales = torch.exp(raised[:, :-1] - raised[:, 1:])
        sums = weights.sum(dim=-1, keepdim=True)
        read = torch.bmm(weights.flatten(0, 1), tile_values).view(*hidden.shape[:3], head_dim)
        for i in range(num_tiles):
            total.mul_(scales[:, i]).add_(sums[:, i])
            output.mul_(scales[:, i]).add_(read[:, i])
        highest = raised[:, -1]
    return (output / total).view(*queries.shape)[:, :, :num_queries]


def _tiles(slots: Tensor, num_blocks: int) -> Tensor:
    """[R, K, num_tiles * TILE, D] -> [R * K * num_blocks * num_tiles, TILE, D], the same tiles for
    each block of queries."""
    num_rows, num_kv_heads, _, head_dim = slots.shape
    tiles = slots.reshape(num_rows, num_kv_heads, 1, -1, TILE, head_dim)
    return tiles.expand(-1, -1, num_blocks, -1, -1, -1).reshape(-1, TILE, head_dim)
