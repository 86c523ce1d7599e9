"""Parts of a step's attention on the CPU: each attends to some slots for some tokens.

    T tokens of the step, t those of a part, R rows of a group, n queries per row, C slots of a row
    H query heads, K KV heads, G = H / K, D head dim

torch's fused kernel takes views of any stride and tells the logarithm of its softmax's sum; by
that, results of several parts for one token are merged to what a single softmax would have given.
It knows no cap of scores: those that have one are attended to by `stage_worker.capped_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stage_worker.attention import Scores
from stage_worker.block_runs import Run
from stage_worker.capped_attention import attend_capped
from stage_worker.kv_cache import KvCache

Partial = tuple[Tensor, Tensor]
"""Attention over a part's slots [t, H, D], and the logarithms of the sums, float32 [t, H]."""


class Part(Protocol):
    @property
    def tokens(self) -> Sequence[int]:
        """[t]: which tokens of the step its results are of, in order."""
        ...

    def attend(self, queries: Tensor, cache: KvCache, layer: int, scores: Scores) -> Partial:
        """queries: [T, H, D]."""
        ...


@dataclass(frozen=True, slots=True)
class Stretch:
    """A run of slots that all of these tokens see, read where it lies."""

    tokens: range
    run: Run

    def attend(self, queries: Tensor, cache: KvCache, layer: int, scores: Scores) -> Partial:
        keys, values = (
            pages.narrow(2, self.run.low, self.run.num_slots) for pages in cache.views(layer)
        )
        own = queries.narrow(0, self.tokens.start, len(self.tokens))
        return _attend(scores, own[None], keys, values)


@dataclass(frozen=True, slots=True)
class Gathered:
    """Copies of slots [R, C], for n tokens of each row: those of `index`, all rows' in turn.

    `mask` [R, 1, n, C] is added to the scores; with `causal` the slots are those of the tokens
    themselves. All is seen where neither is given.
    """

    tokens: Sequence[int]
    index: slice | Tensor
    slots: Tensor
    mask: Tensor | None = None
    causal: bool = False

    def attend(self, queries: Tensor, cache: KvCache, layer: int, scores: Scores) -> Partial:
        keys, values = (x.transpose(1, 2) for x in cache.read(layer, self.slots))
        own = queries[self.index].view(len(self.slots), -1, *queries.shape[1:])
        return _attend(scores, own, keys, values, self.mask, causal=self.causal)


def beside_sinks(partial: Partial, sinks: Tensor) -> Tensor:
    """[t, H, D]: what is left of a result where sinks [H] take their share. The softmax has a term
    more, of no value: its sum is all that must be known of the others."""
    output, logs = partial
    return (output * torch.sigmoid(logs - sinks)[..., None]).to(output.dtype)


def merge(
    partials: Sequence[Partial], tokens: Tensor, num_tokens: int, sinks: Tensor | None = None
) -> Tensor:
    """Results of all parts, of `tokens` [P], each token at least once -> [T, H, D]."""
    outputs, logs = (torch.cat(some) for some in zip(*partials, strict=True))
    places = tokens[:, None].expand_as(logs)
    highest = logs.new_full((num_tokens, logs.shape[1]), -torch.inf)
    highest.scatter_reduce_(0, places, logs, "amax")
    weights = torch.exp(logs - highest[tokens])
    totals = torch.zeros_like(highest).index_add_(0, tokens, weights)
    if sinks is not None:  # infinite where they leave nothing to the values
        totals += torch.exp(sinks - highest)
    sums = logs.new_zeros((num_tokens, *outputs.shape[1:]))
    sums.index_add_(0, tokens, outputs.float() * weights[..., None])
    return (sums / totals[..., None]).to(outputs.dtype)


def _attend(
    scores: Scores,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
) -> Partial:
    """queries: [R, n, H, D]; keys, values: [R, K, C, D] -> of R * n tokens."""
    num_rows, num_queries, num_heads, head_dim = queries.shape
    if scores.cap is not None:
        output, logs = attend_capped(scores, queries, keys, values, mask, causal=causal)
        return output.flatten(0, 1), logs.flatten(0, 1)
    if num_queries == 1:  # the G query heads of a KV head are its queries: it is read once
        queries = queries.view(num_rows, keys.shape[1], -1, head_dim)
    else:
        queries = queries.transpose(1, 2)
    output, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, 0.0, causal, attn_mask=mask, scale=scores.scale
    )
    if num_queries > 1:
        output, logs = output.transpose(1, 2), logs.transpose(1, 2)
    return output.reshape(-1, num_heads, head_dim), logs.reshape(-1, num_heads)
