"""Bias, penalties, and stop tokens that may not come yet: what shapes logits before a choice.

    R rows, V vocabulary, N numbers that change

Each of the steps that docs/sampling.md defines is taken for all rows at once, at the places where
it changes something.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stagemesh.sampling import SamplingSpec


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A token to be chosen for absolute `position`, given what stands before it."""

    position: int
    spec: SamplingSpec
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


def adjust(logits: Tensor, requests: Sequence[SampleRequest]) -> None:
    """logits: float32 [R, V], in place."""
    flat, vocab = logits.view(-1), logits.shape[1]
    _add_biases(flat, vocab, requests)
    _penalise_repetition(flat, vocab, requests)
    _penalise_output(flat, vocab, requests)
    _forbid_stops(flat, vocab, requests)


def _add_biases(flat: Tensor, vocab: int, requests: Sequence[SampleRequest]) -> None:
    pairs = [
        (i * vocab + token, bias)
        for i, request in enumerate(requests)
        for token, bias in request.spec.logit_bias.items()
        if token < vocab
    ]
    if pairs:
        places, biases = zip(*pairs, strict=True)
        flat[_tensor(places, flat)] += flat.new_tensor(biases)


def _penalise_repetition(flat: Tensor, vocab: int, requests: Sequence[SampleRequest]) -> None:
    some = [(i, r) for i, r in enumerate(requests) if r.spec.repetition_penalty != 1.0]
    if not some:
        return
    # A token that was seen twice is here twice, and gets the same value twice.
    seen = [_places(i, vocab, (*r.prompt_token_ids, *r.output_token_ids)) for i, r in some]
    penalties = _repeated((r.spec.repetition_penalty for _, r in some), map(len, seen), flat)
    places = _tensor(np.concatenate(seen), flat)
    values = flat[places]
    flat[places] = torch.where(values > 0, values / penalties, values * penalties)


def _penalise_output(flat: Tensor, vocab: int, requests: Sequence[SampleRequest]) -> None:
    some = [
        (i, r)
        for i, r in enumerate(requests)
        if r.output_token_ids and (r.spec.presence_penalty or r.spec.frequency_penalty)
    ]
    if not some:
        return
    counted = [
        np.unique(_places(i, vocab, r.output_token_ids), return_counts=True) for i, r in some
    ]
    sizes = [len(places) for places, _ in counted]
    frequency = _repeated((r.spec.frequency_penalty for _, r in some), sizes, flat)
    presence = _repeated((r.spec.presence_penalty for _, r in some), sizes, flat)
    counts = _tensor(np.concatenate([counts for _, counts in counted]), flat)
    places = _tensor(np.concatenate([places for places, _ in counted]), flat)
    flat[places] -= frequency * counts + presence


def _forbid_stops(flat: Tensor, vocab: int, requests: Sequence[SampleRequest]) -> None:
    places = [
        i * vocab + token
        for i, request in enumerate(requests)
        if len(request.output_token_ids) < request.spec.min_tokens
        for token in request.spec.stop_token_ids
        if token < vocab
    ]
    if places:
        flat[_tensor(places, flat)] = -math.inf


def _places(row: int, vocab: int, token_ids: Sequence[int]) -> NDArray[np.int64]:
    return np.array(token_ids, dtype=np.int64) + row * vocab


def _repeated(numbers: Iterable[float], counts: Iterable[int], like: Tensor) -> Tensor:
    """float32 [N]: each number so many times."""
    values = np.repeat(np.array([*numbers], dtype=np.float32), [*counts])
    return torch.from_numpy(values).to(like.device)


def _tensor(numbers: Sequence[int] | NDArray[np.int64], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=like.device)
