"""Attention on the CPU whose scores are capped, which torch's fused kernel does not do.

    R rows of a group, n queries per row, C slots of a row
    H query heads, K KV heads, G = H / K, D head dim

Two matrix products with the scores between them in memory: as many queries at a time as keeps
those in a processor's cache, or nearly. The queries of all heads of a KV head are multiplied
together, so that it is read once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stage_worker.attention import Scores

# Of scores, at a time.
_MAX_SCORE_BYTES = 2 * 2**20


def attend_capped(
    scores: Scores,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs [R, n, H, D] and the logarithms of the softmax's sums, float32 [R, n, H].

    queries: [R, n, H, D]; keys, values: [R, K, C, D]; mask [R, 1, n, C] is added to the scores;
    with `causal` the slots are those of the queries themselves.
    """
    num_rows, num_queries, num_heads, _ = queries.shape
    per_query = num_rows * num_heads * keys.shape[2] * torch.float32.itemsize
    size = max(1, _MAX_SCORE_BYTES // per_query)
    results = []
    for start in range(0, num_queries, size):
        some = slice(start, min(start + size, num_queries))
        end = some.stop if causal else keys.shape[2]
        seen = mask[:, :, some] if mask is not None else None
        if causal:
            seen = _causal_mask(some, queries.device)
        results.append(
            _attend(scores, queries[:, some], keys[:, :, :end], values[:, :, :end], seen)
        )
    outputs, logs = zip(*results, strict=True)
    return (
        (outputs[0], logs[0]) if len(results) == 1 else (torch.cat(outputs, 1), torch.cat(logs, 1))
    )


def cap_in_place(scores: Tensor, cap: float) -> Tensor:
    return scores.div_(cap).tanh_().mul_(cap)


def _attend(
    scores: Scores, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    num_rows, num_queries, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    # [R, n, K, G, D] -> [R, K, G * n, D]
    grouped = queries.view(num_rows, num_queries, num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    grouped = grouped.reshape(num_rows, num_kv_heads, -1, head_dim)
    products = (grouped @ keys.transpose(2, 3)).float().mul_(scores.factor(head_dim))
    assert scores.cap is not None
    cap_in_place(products, scores.cap)
    if mask is not None:
        products.view(num_rows, num_kv_heads, -1, num_queries, keys.shape[2]).add_(mask[:, :, None])
    logs = products.logsumexp(dim=-1, keepdim=True)
    weights = products.sub_(logs).exp_().to(values.dtype)
    output = (weights @ values).view(num_rows, num_kv_heads, -1, num_queries, head_dim)
    output = output.permute(0, 3, 1, 2, 4).reshape(num_rows, num_queries, num_heads, head_dim)
    logs = logs.view(num_rows, num_heads, num_queries).transpose(1, 2)
    return output, logs


def _causal_mask(some: slice, device: torch.device) -> Tensor:
    """[1, 1, n, some.stop]: what queries `some` see of the slots up to the last of them."""
    own = torch.arange(some.start, some.stop, device=device)[:, None]
    hidden = torch.arange(some.stop, device=device) > own
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)[None, None]
