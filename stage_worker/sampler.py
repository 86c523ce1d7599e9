"""Chooses tokens: bias and penalties, log-probabilities, filters, then the largest noisy one.

    R rows, V vocabulary

A row's token is a function of its logits, its history and its parameters; other rows play no part.
docs/sampling.md defines each step; `stage_worker.noise` is the randomness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stage_worker.batched_draw import draw_rows, is_unfiltered
from stage_worker.noise import gumbel, stream_of
from stagemesh.plan import SampledToken
from stagemesh.sampling import SamplingSpec


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A token to be chosen for absolute `position`, given what stands before it."""

    position: int
    spec: SamplingSpec
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


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

    What `sample` chooses for such rows, in one transfer from the device.
    """
    finite = torch.isfinite(logits).all(dim=1)
    tokens: list[int] = torch.where(finite, logits.argmax(dim=1), -1).tolist()
    return tokens


def sample(logits: Tensor, requests: Sequence[SampleRequest]) -> list[SampledToken | None]:
    """logits: float32 [R, V], overwritten -> a token per row, None where numbers are not finite."""
    usable = torch.isfinite(logits).all(dim=1)
    for row, request in zip(logits, requests, strict=True):
        _adjust(row, request)
    greedy = logits.argmax(dim=1).tolist()  # the lowest id of equal ones
    logprobs = None
    drawn: dict[int, int] = {}
    if any(r.spec.temperature > 0 or r.spec.num_logprobs is not None for r in requests):
        logprobs = logits.log_softmax(dim=1)
        usable &= ~logprobs[:, 0].isnan()  # all are, where every token is masked
        if logits.device.type == "cuda":
            drawn = _draw_together(logprobs, requests)
    return [
        _choose(request, greedy[i], None if logprobs is None else logprobs[i], drawn.get(i))
        if is_usable
        else None
        for i, (request, is_usable) in enumerate(zip(requests, usable.tolist(), strict=True))
    ]


def _draw_together(logprobs: Tensor, requests: Sequence[SampleRequest]) -> dict[int, int]:
    """Tokens of the rows for which every token is a candidate."""
    some = [i for i, request in enumerate(requests) if is_unfiltered(request.spec)]
    if not some:
        return {}
    tokens = draw_rows(
        logprobs if len(some) == len(requests) else logprobs[some],
        [requests[i].spec.temperature for i in some],
        [stream_of(requests[i].spec.seed, requests[i].position) for i in some],
    )
    return dict(zip(some, tokens, strict=True))


def _choose(
    request: SampleRequest, greedy: int, logprobs: Tensor | None, drawn: int | None
) -> SampledToken | None:
    spec, token = request.spec, greedy
    if logprobs is None:
        return SampledToken(request.position, token)
    if drawn is not None:
        token = drawn
    elif spec.temperature > 0:
        token = _draw(logprobs, spec, stream_of(spec.seed, request.position))
    if spec.num_logprobs is None:
        return SampledToken(request.position, token)
    return describe(logprobs, request.position, token, spec.num_logprobs)


def describe(logprobs: Tensor, position: int, token: int, num_alternatives: int) -> SampledToken:
    """A known or chosen token with its log-probability and the likeliest others. logprobs: [V]"""
    alternatives: tuple[tuple[int, float], ...] = ()
    if num_alternatives:
        ids = _likeliest(logprobs, num_alternatives)
        pairs = zip(ids.tolist(), logprobs[ids].tolist(), strict=True)
        alternatives = tuple(pair for pair in pairs if math.isfinite(pair[1]))
    return SampledToken(position, token, float(logprobs[token]), alternatives)


def _adjust(logits: Tensor, request: SampleRequest) -> None:
    """Bias, penalties and the stop tokens that may not come yet, in place. logits: [V]"""
    spec = request.spec
    biases = {i: bias for i, bias in spec.logit_bias.items() if i < len(logits)}
    if biases:
        logits[_ids(biases, logits)] += logits.new_tensor(list(biases.values()))
    if spec.repetition_penalty != 1.0:
        seen = _ids({*request.prompt_token_ids, *request.output_token_ids}, logits)
        values, penalty = logits[seen], spec.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if request.output_token_ids and (spec.presence_penalty or spec.frequency_penalty):
        ids, counts = torch.unique(_ids(request.output_token_ids, logits), return_counts=True)
        logits[ids] -= spec.frequency_penalty * counts + spec.presence_penalty
    if len(request.output_token_ids) < spec.min_tokens and spec.stop_token_ids:
        stops = [token for token in spec.stop_token_ids if token < len(logits)]
        logits[_ids(stops, logits)] = -math.inf


def _ids(token_ids: Sequence[int] | set[int] | dict[int, float], like: Tensor) -> Tensor:
    return torch.tensor(list(token_ids), dtype=torch.int64, device=like.device)


def _draw(logprobs: Tensor, spec: SamplingSpec, stream: int) -> int:
    """Gumbel-max over the candidates that the filters leave. logprobs: [V]"""
    # The likeliest is at 0, so that no temperature, however low, makes it overflow.
    scaled = (logprobs - logprobs.max()).double() / spec.temperature
    ids = _filter(scaled, spec)
    noisy = scaled[ids] + gumbel(stream, ids)
    return int(ids[noisy == noisy.max()].min())


def _filter(scaled: Tensor, spec: SamplingSpec) -> Tensor:
    """Ids that top_k, then top_p among those, then min_p leave; the likeliest is always left."""
    if 0 < spec.top_k < len(scaled):
        ids = _likeliest(scaled, spec.top_k)
    elif spec.top_p < 1.0:
        ids = scaled.argsort(descending=True, stable=True)
    else:
        ids = torch.arange(len(scaled), device=scaled.device)
    if spec.top_p < 1.0:
        probabilities = scaled[ids].softmax(dim=0)
        before = probabilities.cumsum(dim=0) - probabilities
        before[0] = 0.0
        ids = ids[before < spec.top_p]
    if spec.min_p > 0.0:
        ids = ids[scaled[ids] >= math.log(spec.min_p)]
    return ids


def _likeliest(values: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest, largest first; of equal ones the lowest ids. values: [V]"""
    count = min(count, len(values))
    smallest = values.topk(count).values[-1]
    ids = (values >= smallest).nonzero().flatten()
    return ids[values[ids].argsort(descending=True, stable=True)[:count]]
