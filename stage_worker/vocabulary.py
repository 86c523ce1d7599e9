"""Embedding and LM head of a rank that has a part of the vocabulary: what the ranks exchange.

    T tokens, R rows, E hidden size, V vocabulary, P of it this rank's

A token is looked up by the rank that has it. The likeliest token is found from each rank's own
likeliest; all logits of a row come together only where a parameter needs them, and on rank 0 only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stage_worker.candidates import all_finite, likeliest
from stage_worker.collectives import Group
from stage_worker.sampler import greedy_tokens
from stage_worker.sharding import Shards


class Vocabulary:
    def __init__(self, shards: Shards, group: Group) -> None:
        self._tokens = shards.vocabulary
        self._size = shards.spec.vocab_size
        # The widest part: the first rank's.
        self._width = -(-self._size // group.size)
        self._group = group

    def look_up(self, embedding: Tensor, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """embedding: [P, E]; token_ids: [T] -> [T, E]"""
        if self._group.size == 1:
            return torch.nn.functional.embedding(token_ids, embedding).to(dtype)
        places = token_ids - self._tokens.start
        is_elsewhere = (places < 0) | (places >= len(self._tokens))
        found = torch.nn.functional.embedding(places.masked_fill_(is_elsewhere, 0), embedding)
        return self._group.all_reduce(found.to(dtype).masked_fill_(is_elsewhere[:, None], 0))

    def greedy(self, logits: Tensor) -> list[int]:
        """[R, P] -> the likeliest token of each, the lowest of equal ones, -1 where numbers are not
        finite; on every rank."""
        if self._group.size == 1:
            return greedy_tokens(logits)
        ids = likeliest(logits)
        found = torch.empty(2, len(ids), dtype=torch.float64)  # has every token id
        found[1] = torch.tensor(ids)
        found[0] = logits.gather(1, found[1].long()[:, None])[:, 0]
        found[0].masked_fill_(~all_finite(logits), math.nan)
        found[1] += self._tokens.start
        values, tokens = torch.stack(self._group.all_gather(found)).unbind(1)
        best = torch.tensor([likeliest(values.t().float())])
        is_finite = ~values.isnan().any(dim=0)
        chosen = tokens.gather(0, best)[0].masked_fill_(~is_finite, -1)
        return [int(token) for token in chosen.tolist()]

    def gathered(self, logits: Tensor) -> Tensor | None:
        """[R, P] -> [R, V] on rank 0, None on others."""
        if self._group.size == 1:
            return logits
        missing = self._width - logits.shape[1]
        parts = self._group.gather(torch.nn.functional.pad(logits, (0, missing)))
        return None if parts is None else _joined(parts, self._size)


def _joined(parts: list[Tensor], vocab_size: int) -> Tensor:
    """Parts that differ in width by one at most, the wider ones first, all padded to the widest."""
    num_wide = vocab_size % len(parts) or len(parts)
    narrow = [part[:, :-1] for part in parts[num_wide:]]
    return torch.cat([*parts[:num_wide], *narrow], dim=1)
