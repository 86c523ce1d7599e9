"""Which of many values count: the largest of each row, those from a limit on, all of them finite.

    R rows, V vocabulary, C values of a row that were asked for

Values are compared and never computed, so what is found of a row does not depend on other rows.
Rows are looked at together, on their device, and what is found, which is little, comes to the host
in one piece. Where torch is slow on a CPU, numpy has a view of the same memory. Of rows with NaN
nothing is promised but that `all_finite` knows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Found(NamedTuple):
    """Of one row: ids [C] and their float32 values [C]."""

    ids: NDArray[np.int64]
    values: NDArray[np.float32]

    def largest_first(self, count: int | None = None) -> Found:
        """At most so many; of equal ones those with the lowest ids, where ids rise."""
        order = np.argsort(-self.values, kind="stable")[:count]
        return Found(self.ids[order], self.values[order])


def all_finite(values: Tensor) -> Tensor:
    """[R, V] -> bool [R]. NaN is the largest and the smallest of a row that has it."""
    return torch.isfinite(values.amax(dim=1)) & torch.isfinite(values.amin(dim=1))


def likeliest(values: Tensor) -> list[int]:
    """[R, V] -> id of each row's largest, the lowest of equal ones."""
    if values.device.type == "cpu" and values.dtype == torch.float32:
        ids: list[int] = values.numpy().argmax(axis=1).tolist()
    else:
        ids = values.argmax(dim=1).tolist()
    return ids


def at_least(values: Tensor, limits: Tensor) -> list[Found]:
    """values: float32 [R, V]; limits: [R] -> those of each row that reach its limit, by id."""
    return chosen(values, values >= limits[:, None])


def chosen(values: Tensor, mask: Tensor) -> list[Found]:
    """values: float32 [R, V]; mask: bool [R, V] -> those of each row, by id."""
    num_rows, vocab = values.shape
    if values.device.type == "cpu":
        places = np.flatnonzero(mask.numpy())
        found = values.numpy().reshape(-1)[places]
    else:
        index = mask.flatten().nonzero().flatten()
        places = index.cpu().numpy()
        found = values.flatten()[index].cpu().numpy()
    bounds = np.searchsorted(places, np.arange(num_rows + 1) * vocab).tolist()
    return [
        Found(places[low:high] - row * vocab, found[low:high])
        for row, (low, high) in enumerate(pairwise(bounds))
    ]


def largest(values: Tensor, counts: Sequence[int]) -> list[Found]:
    """values: float32 [R, V] -> so many of each row, at least one, largest first; of equal ones
    the lowest ids."""
    counts = [min(count, values.shape[1]) for count in counts]
    highest = values.topk(max(counts), dim=1).values
    last = torch.tensor(counts, device=values.device)[:, None] - 1
    limits = highest.gather(1, last)[:, 0]
    # Which of equal ones `topk` takes is not said, so all that reach the limit are looked at.
    return [
        found.largest_first(count)
        for found, count in zip(at_least(values, limits), counts, strict=True)
    ]
