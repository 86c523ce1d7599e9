"""Which ranks have which experts of a layer, by the tokens that the router gives them.

Near to what DeepSeek's load balancer does (EPLB, 2025): places that are left over go to whichever
expert has the most tokens for each rank that has it, and the busiest are placed first, each on the
rank that has the least to do. Plain arithmetic, the same on every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Placement = tuple[tuple[int, ...], ...]
"""Of each rank: its experts, in order."""

_MAX_PASSED = 64  # looks


@dataclass(frozen=True, slots=True)
class Turn:
    """Of an expert that several ranks have, a rank takes every `num_holders`th token from
    `first` on."""

    first: int
    num_holders: int


def place(tokens: Sequence[float], num_ranks: int, num_redundant: int) -> Placement:
    """`tokens` were given to each expert. A rank has room for an even share of them, rounded up,
    and for `num_redundant` more.

    Of the placements with one more copy each time, it is the one whose busiest rank has least to
    do: another copy is not always a gain, since a rank cannot have two of one expert.
    """
    num_experts = len(tokens)
    num_places = _places_of_a_rank(num_experts, num_ranks, num_redundant)
    holders = [1] * num_experts
    best = _packed(tokens, holders, num_ranks, num_places)
    for _ in range(num_ranks * num_places - num_experts):
        more = [i for i in range(num_experts) if holders[i] < num_ranks]
        if not more:
            break
        holders[max(more, key=lambda i: (tokens[i] / holders[i], -i))] += 1
        found = _packed(tokens, holders, num_ranks, num_places)
        if peak(found, tokens) < peak(best, tokens):
            best = found
    return best


def _packed(
    tokens: Sequence[float], holders: Sequence[int], num_ranks: int, num_places: int
) -> Placement:
    """So many copies of each expert, the busiest first, each on the rank that has least to do."""
    copies = [(tokens[i] / holders[i], i) for i in range(len(tokens)) for _ in range(holders[i])]
    ranks: list[set[int]] = [set() for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for load, expert in sorted(copies, key=lambda copy: (-copy[0], copy[1])):
        open_ranks = [
            r for r in range(num_ranks) if len(ranks[r]) < num_places and expert not in ranks[r]
        ]
        if not open_ranks:  # those that have room have it already: one holder less
            continue
        rank = min(open_ranks, key=lambda r: (loads[r], len(ranks[r]), r))
        ranks[rank].add(expert)
        loads[rank] += load
    return tuple(tuple(sorted(each)) for each in ranks)


@functools.cache
def first_placement(num_experts: int, num_ranks: int, num_redundant: int) -> Placement:
    """While nothing is known of the router: in order, in parts that differ by one at most; then the
    next experts in the places that are left over."""
    num_places = _places_of_a_rank(num_experts, num_ranks, num_redundant)
    small, num_large = divmod(num_experts, num_ranks)
    placement, start = [], 0
    for rank in range(num_ranks):
        own = small + (rank < num_large)
        num_held = num_places if num_redundant else own
        held = {(start + i) % num_experts for i in range(num_held)}
        placement.append(tuple(sorted(held)))
        start += own
    return tuple(placement)


def _places_of_a_rank(num_experts: int, num_ranks: int, num_redundant: int) -> int:
    return min(num_experts, -(-num_experts // num_ranks) + num_redundant)


def _holders(placement: Placement, expert: int) -> list[int]:
    """The ranks that have it."""
    return [rank for rank, experts in enumerate(placement) if expert in experts]


def turns(placement: Placement, rank: int) -> dict[int, Turn]:
    """Of each expert that the rank has."""
    found = {}
    for expert in placement[rank]:
        holders = _holders(placement, expert)
        found[expert] = Turn(holders.index(rank), len(holders))
    return found


def peak(placement: Placement, tokens: Sequence[float]) -> float:
    """What the busiest rank has to do: tokens of its experts, as far as they are its to take."""
    shares = [0.0] * len(placement)
    for expert, num_tokens in enumerate(tokens):
        holders = _holders(placement, expert)
        for rank in holders:
            shares[rank] += num_tokens / len(holders)
    return max(shares)


class PlacementBalance:
    """Looks, every so many steps, whether another placement of some layer's experts would spare the
    busiest rank work.

    One layer at a time, since reading experts takes a while; and what was seen counts half as much
    at each look, so that a few steps of another kind move nothing. It is told what becomes of what
    it chose: `placed`, or `failed`.
    """

    def __init__(
        self,
        num_experts: int,
        num_ranks: int,
        num_redundant: int,
        *,
        steps_between: int = 64,
        min_gain: float = 0.2,
    ) -> None:
        self._first = first_placement(num_experts, num_ranks, num_redundant)
        self._num_ranks, self._num_redundant = num_ranks, num_redundant
        self._steps_between, self._min_gain = steps_between, min_gain
        self._num_steps = self._num_looks = 0
        self._placements: dict[int, Placement] = {}
        self._seen: dict[int, Sequence[int]] = {}
        self._recent: dict[int, list[float]] = {}
        # By layer: how often it failed in a row, and the looks that pass it over for that.
        self._num_failures: dict[int, int] = {}
        self._passed_until: dict[int, int] = {}

    def count_step(self) -> bool:
        """Whether it is time to look."""
        self._num_steps += 1
        return self._num_steps % self._steps_between == 0

    def change(self, routing: Mapping[int, Sequence[int]]) -> tuple[int, Placement] | None:
        """`routing`: tokens given to each expert so far, by layer. The layer where most is gained,
        and a placement for it; None where nothing is worth it."""
        self._num_looks += 1
        best: tuple[float, int, Placement] | None = None
        for layer, total in routing.items():
            tokens = self._take(layer, total)
            if self._num_looks <= self._passed_until.get(layer, 0):
                continue
            placement = place(tokens, self._num_ranks, self._num_redundant)
            now = peak(self._placements.get(layer, self._first), tokens)
            gain = 1 - peak(placement, tokens) / now if now else 0.0
            if gain >= self._min_gain and (best is None or gain > best[0]):
                best = gain, layer, placement
        if best is None:
            return None
        _, layer, placement = best
        return layer, placement

    def placed(self, layer: int, placement: Placement) -> None:
        """The layer's experts are so from now on."""
        self._placements[layer] = placement
        self._num_failures.pop(layer, None)

    def failed(self, layer: int) -> None:
        """The layer stays as it was; looks pass it over for a while, and longer each time."""
        failures = self._num_failures.get(layer, 0) + 1
        self._num_failures[layer] = failures
        self._passed_until[layer] = self._num_looks + min(2**failures, _MAX_PASSED)

    def _take(self, layer: int, total: Sequence[int]) -> list[float]:
        """What each expert was given, the latest counting most."""
        before = self._seen.get(layer, [0] * len(total))
        old = self._recent.get(layer, [0.0] * len(total))
        recent = [o / 2 + now - then for o, now, then in zip(old, total, before, strict=True)]
        self._seen[layer], self._recent[layer] = list(total), recent
        return recent
