"""Draws the tokens of many rows: candidates are found for all at once, then decided between.

    R rows, V vocabulary, C candidates of a row

What a row's candidates are needs comparisons and, for `top_p`, one sum, which torch computes row
after row; which of them it is follows from numbers that are computed for this row alone, in float64
on the host. So a token does not depend on other rows, on any device. Rows that are filtered alike
are narrowed down together: to what top_k leaves, or a little more than top_p or min_p will, or
without filters to those whose noise may be enough. docs/sampling.md defines what is computed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stage_worker.candidates import Found, at_least, chosen, largest, likeliest
from stage_worker.noise import MAX_ERROR, gumbel, gumbel_bounds, gumbel_of
from stagemesh.sampling import SamplingSpec

# Numbers that are worked on at once: what the caches of two cores hold, or enough for a GPU.
_MAX_NUMBERS = {"cpu": 2**17, "cuda": 2**22}
# Few enough to compute each one's noise by itself.
_FEW = 8
# In float32, of what is compared with `gumbel_bounds`: values beyond 100 are out of reach.
_BOUND_ERROR = 1e-3
# A lower temperature than any that float32 could scale by makes a bound no lower.
_MIN_BOUND_TEMPERATURE = 1e-30


@dataclass(frozen=True, slots=True)
class Draw:
    """A token to be drawn; `stream` is where its noise comes from. The temperature is not 0."""

    spec: SamplingSpec
    stream: int


def draw(logprobs: Tensor, draws: Sequence[Draw]) -> list[int]:
    """logprobs: float32 [R, V], finite or below all others -> a token for each row."""
    tokens = [0] * len(draws)
    limit = max(1, _MAX_NUMBERS.get(logprobs.device.type, 2**22) // logprobs.shape[1])
    for narrow, rows in _alike(draws, logprobs.shape[1]):
        for start in range(0, len(rows), limit):
            some = rows[start : start + limit]
            in_order = some == [*range(some[0], some[0] + len(some))]
            part = logprobs[some[0] : some[-1] + 1] if in_order else logprobs[some]
            # The likeliest is at 0, so that no temperature, however low, makes it overflow.
            below = part - part.amax(dim=1, keepdim=True)
            own = [draws[i] for i in some]
            for i, token in zip(some, narrow(below, own), strict=True):
                tokens[i] = token
    return tokens


_Narrow = Callable[[Tensor, Sequence[Draw]], Iterator[int]]


def _alike(draws: Sequence[Draw], vocab: int) -> Iterator[tuple[_Narrow, list[int]]]:
    """Rows by what narrows their candidates down most surely; those of similar top_k in turn."""
    kinds: dict[_Narrow, list[int]] = defaultdict(list)
    for i, each in enumerate(draws):
        spec = each.spec
        if 0 < spec.top_k < vocab:
            kinds[_by_top_k].append(i)
        elif spec.top_p < 1.0:
            kinds[_by_top_p].append(i)
        else:
            kinds[_by_min_p if spec.min_p > 0.0 else _by_noise].append(i)
    kinds[_by_top_k].sort(key=lambda i: draws[i].spec.top_k)
    return ((narrow, rows) for narrow, rows in kinds.items() if rows)


def _by_top_k(below: Tensor, draws: Sequence[Draw]) -> Iterator[int]:
    counts = [each.spec.top_k for each in draws]
    for found, each in zip(largest(below, counts), draws, strict=True):
        scaled = _scaled(found, each.spec)
        total = float(np.exp(scaled).sum())
        yield _decide(*_filter(found.ids, scaled, each.spec, total), each.stream)


def _by_top_p(below: Tensor, draws: Sequence[Draw]) -> Iterator[int]:
    """Tokens whose probability is below (1 - p) / V are less than 1 - p together, so those that
    stay are not among them."""
    heat = _column([each.spec.temperature for each in draws], below, torch.float64)
    scaled = below.double() / heat
    # The likeliest has exp(0) of the sum that is wanted.
    totals = [1.0 / share for share in scaled.softmax(dim=1).amax(dim=1).tolist()]
    # Half of that probability, for roundings.
    limits = [
        math.log(total * (1.0 - each.spec.top_p) / (2 * below.shape[1]))
        for each, total in zip(draws, totals, strict=True)
    ]
    mask = scaled >= _column(limits, below, torch.float64)
    for found, each, total in zip(chosen(below, mask), draws, totals, strict=True):
        ranked = found.largest_first()
        values = _scaled(ranked, each.spec)
        yield _decide(*_filter(ranked.ids, values, each.spec, total), each.stream)


def _by_min_p(below: Tensor, draws: Sequence[Draw]) -> Iterator[int]:
    # A little lower, for roundings in float32.
    limits = [1.0001 * math.log(d.spec.min_p) * d.spec.temperature - 1e-6 for d in draws]
    found_rows = at_least(below, _column(limits, below, torch.float32)[:, 0])
    for found, each in zip(found_rows, draws, strict=True):
        yield _decide(*_filter(found.ids, _scaled(found, each.spec), each.spec, 1.0), each.stream)


def _by_noise(below: Tensor, draws: Sequence[Draw]) -> Iterator[int]:
    """All tokens are candidates. Those of a row that could beat one of them, the best by its bound,
    are those whose bounds are as high as what that one really has."""
    bounds = gumbel_bounds([each.stream for each in draws], below.shape[1], below.device)
    heats = [1.0 / max(each.spec.temperature, _MIN_BOUND_TEMPERATURE) for each in draws]
    bounds.addcmul_(below, _column(heats, below, torch.float32))
    best = likeliest(bounds)
    index = torch.tensor(best, device=below.device)[:, None]
    at_best: list[float] = below.gather(1, index)[:, 0].tolist()
    reached = [
        value / each.spec.temperature + gumbel_of(each.stream, token) - _BOUND_ERROR
        for each, token, value in zip(draws, best, at_best, strict=True)
    ]
    mask = bounds >= _column(reached, below, torch.float32)
    for found, each in zip(chosen(below, mask), draws, strict=True):
        yield _decide(found.ids, _scaled(found, each.spec), each.stream)


def _column(numbers: Sequence[float], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=like.device)[:, None]


def _scaled(found: Found, spec: SamplingSpec) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        scaled: NDArray[np.float64] = found.values.astype(np.float64) / spec.temperature
    return scaled


def _filter(
    ids: NDArray[np.int64], scaled: NDArray[np.float64], spec: SamplingSpec, total: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What top_p, then min_p leave; the likeliest is always left. ids, scaled: [C], largest first
    for top_p; `total` is the sum of exp(s) over all that could stay."""
    if spec.top_p < 1.0:
        sums = np.exp(scaled).cumsum()
        # A token stays if the sum of those before it is below p.
        num_left = 1 + int(np.searchsorted(sums[:-1], spec.top_p * total, side="left"))
        ids, scaled = ids[:num_left], scaled[:num_left]
    if spec.min_p > 0.0:
        stays = scaled >= math.log(spec.min_p)
        ids, scaled = ids[stays], scaled[stays]
    return ids, scaled


def _decide(ids: NDArray[np.int64], scaled: NDArray[np.float64], stream: int) -> int:
    """The one that is largest with its noise, the lowest of equal ones. ids, scaled: [C]"""
    if len(ids) > _FEW:
        noisy = scaled + gumbel(stream, ids)
        near = noisy >= noisy.max() - 2 * MAX_ERROR
        ids, scaled = ids[near], scaled[near]
    pairs = zip(ids.tolist(), scaled.tolist(), strict=True)
    _, token = min((-(value + gumbel_of(stream, token)), token) for token, value in pairs)
    return int(token)
