"""Chooses tokens: bias and penalties, log-probabilities, filters, then the largest noisy one.

    R rows, V vocabulary

A row's token is a function of its logits, its history and its parameters; other rows play no part.
docs/sampling.md defines each step; `stage_worker.noise` is the randomness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stage_worker.candidates import Found, all_finite, largest, likeliest
from stage_worker.drawing import Draw, draw
from stage_worker.noise import stream_of
from stage_worker.penalties import SampleRequest, adjust
from stagemesh.plan import SampledToken
from stagemesh.sampling import SamplingSpec

__all__ = [
    "Known",
    "SampleRequest",
    "describe",
    "greedy_tokens",
    "is_plain_greedy",
    "sample",
]


def is_plain_greedy(spec: SamplingSpec) -> bool:
    """Whether the token is the likeliest by the model's own logits, and no more is told of it."""
    return (
        spec.temperature == 0
        and spec.num_logprobs is None
        and spec.repetition_penalty == 1.0
        and not spec.presence_penalty
        and not spec.frequency_penalty
        and not spec.logit_bias
        and not (spec.min_tokens and spec.stop_token_ids)
    )


def greedy_tokens(logits: Tensor) -> list[int]:
    """logits: [R, V] -> the likeliest token of each row, -1 where numbers are not finite.

    What `sample` chooses for such rows.
    """
    finite: list[bool] = all_finite(logits).tolist()
    return [
        token if is_finite else -1
        for token, is_finite in zip(likeliest(logits), finite, strict=True)
    ]


def sample(logits: Tensor, requests: Sequence[SampleRequest]) -> list[SampledToken | None]:
    """logits: float32 [R, V], overwritten -> a token per row, None where numbers are not finite."""
    usable = all_finite(logits)
    adjust(logits, requests)
    logprobs = None
    if any(r.spec.temperature > 0 or r.spec.num_logprobs is not None for r in requests):
        logprobs = logits.log_softmax(dim=1)
        usable &= ~logprobs[:, 0].isnan()  # all are, where every token is masked
    rows = [i for i, is_usable in enumerate(usable.tolist()) if is_usable]
    tokens: dict[int, int] = {}
    if any(requests[i].spec.temperature == 0 for i in rows):
        tokens = dict(enumerate(likeliest(logits)))
    chosen: dict[int, SampledToken] = {}
    if logprobs is not None:
        drawn = [i for i in rows if requests[i].spec.temperature > 0]
        draws = [Draw(requests[i].spec, _stream(requests[i])) for i in drawn]
        tokens |= zip(drawn, draw(_rows(logprobs, drawn), draws), strict=True)
        told = [i for i in rows if requests[i].spec.num_logprobs is not None]
        known = [Known(requests[i].position, tokens[i], _num_told(requests[i])) for i in told]
        chosen = dict(zip(told, describe(_rows(logprobs, told), known), strict=True))
    for i in rows:
        if i not in chosen:
            chosen[i] = SampledToken(requests[i].position, tokens[i])
    return [chosen.get(i) for i in range(len(requests))]


class Known(NamedTuple):
    """A token that is known or chosen, and how many others are told beside it."""

    position: int
    token: int
    num_alternatives: int


def describe(logprobs: Tensor, known: Sequence[Known]) -> list[SampledToken]:
    """Each row's token with its log-probability and the likeliest others. logprobs: [R, V]"""
    if not known:
        return []
    ids = torch.tensor([each.token for each in known], device=logprobs.device)
    own: list[float] = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    others: list[tuple[tuple[int, float], ...]] = [()] * len(known)
    if any(each.num_alternatives for each in known):
        counts = [max(1, each.num_alternatives) for each in known]
        others = [_pairs(found) for found in largest(logprobs, counts)]
    return [
        SampledToken(each.position, each.token, logprob, pairs if each.num_alternatives else ())
        for each, logprob, pairs in zip(known, own, others, strict=True)
    ]


def _pairs(found: Found) -> tuple[tuple[int, float], ...]:
    pairs = zip(found.ids.tolist(), found.values.tolist(), strict=True)
    return tuple(pair for pair in pairs if math.isfinite(pair[1]))


def _rows(values: Tensor, rows: Sequence[int]) -> Tensor:
    """values: [R, V]"""
    return values if len(rows) == len(values) else values[list(rows)]


def _stream(request: SampleRequest) -> int:
    return stream_of(request.spec.seed, request.position)


def _num_told(request: SampleRequest) -> int:
    return request.spec.num_logprobs or 0
