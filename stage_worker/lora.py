"""Low-rank adapters beside a layer's linear layers: W x + B A x, each token with its own adapter.

    T tokens of a step, N of them with one adapter; R rank; I inputs, O outputs

The base's linear layers run once for all tokens, whatever they are made of; what an adapter adds is
added to the rows of its tokens afterwards. The decoder's linear layers are slots; one of them may
be several matrices of the model, each with its range of the outputs. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stage_worker import weight_names as roles
from stagemesh.errors import ProtocolError

# The decoder's linear layers, and what lies in them side by side.
SLOTS = {
    "qkv": (roles.QUERY, roles.KEY, roles.VALUE),
    "output": (roles.OUTPUT,),
    "gate_up": (roles.GATE, roles.UP),
    "down": (roles.DOWN,),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """`a` [R, I], `b` [O, R] with the scaling in it."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class _Part:
    """What one matrix of a slot adds to outputs [start, end), from ranks [first, last)."""

    b: Tensor
    first: int
    last: int
    start: int
    end: int


class SlotDelta:
    """What an adapter adds in one slot. `a` is of all its matrices, one below the other."""

    def __init__(self, pairs: Sequence[Pair | None], sizes: Sequence[int]) -> None:
        """One entry for each matrix of the slot, whose outputs are `sizes`; one is not None."""
        self._a = torch.cat([pair.a for pair in pairs if pair is not None])
        self._parts: list[_Part] = []
        first = start = 0
        for pair, size in zip(pairs, sizes, strict=True):
            if pair is not None:
                last = first + pair.b.shape[1]
                self._parts.append(_Part(pair.b, first, last, start, start + size))
                first = last
            start += size

    @property
    def nbytes(self) -> int:
        return self._a.nbytes + sum(part.b.nbytes for part in self._parts)

    def add(self, x: Tensor, y: Tensor) -> None:
        """[N, I]: adds to [N, O] in place."""
        low = torch.nn.functional.linear(x, self._a)
        for part in self._parts:
            y[:, part.start : part.end].addmm_(low[:, part.first : part.last], part.b.t())


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter's part of a stage: what it adds, by slot, in each of the stage's layers."""

    layers: tuple[Mapping[str, SlotDelta], ...]


@dataclass(frozen=True, slots=True)
class _Group:
    """Tokens of one adapter: one run of them, or several, in order."""

    adapter: Adapter
    runs: list[tuple[int, int]]
    index: Tensor | None  # [N], where there are several runs


class StepAdapters:
    """Which tokens of a step go with which adapter."""

    def __init__(self, groups: Sequence[_Group], one_by_one: bool) -> None:
        self._groups = groups
        self._one_by_one = one_by_one

    def add(self, layer: int, slot: str, x: Tensor, y: Tensor) -> None:
        """What went into the slot, [T, I]: adds to what came out, [T, O], in place. `layer` counts
        from the stage's first."""
        for group in self._groups:
            delta = group.adapter.layers[layer].get(slot)
            if delta is None:
                continue
            if self._one_by_one:
                self._add_one_by_one(delta, group.runs, x, y)
            elif group.index is None:
                start, end = group.runs[0]
                delta.add(x[start:end], y[start:end])
            else:
                rows = y.index_select(0, group.index)
                delta.add(x.index_select(0, group.index), rows)
                y.index_copy_(0, group.index, rows)

    def _add_one_by_one(
        self, delta: SlotDelta, runs: Sequence[tuple[int, int]], x: Tensor, y: Tensor
    ) -> None:
        """A token's bits must not depend on how many there are, nor on where it lies in memory."""
        for start, end in runs:
            for token in range(start, end):
                row = y[token : token + 1].clone()
                delta.add(x[token : token + 1].clone(), row)
                y[token] = row[0]


class StageAdapters:
    """All adapters of a stage, by identity. `one_by_one`: bits must not depend on the batch."""

    def __init__(self, adapters: Mapping[str, Adapter], *, one_by_one: bool = False) -> None:
        self._adapters = adapters
        self._one_by_one = one_by_one

    def check(self, identity: str) -> None:
        """Raises ProtocolError for an adapter that is not here; empty is none."""
        if identity and identity not in self._adapters:
            raise ProtocolError(f"adapter {identity} is not loaded here")

    def for_step(self, rows: Sequence[tuple[str, int]]) -> StepAdapters | None:
        """`rows`: adapter and number of tokens of each, one after another; None: no row has one."""
        runs: dict[str, list[tuple[int, int]]] = {}
        end = 0
        for identity, num_tokens in rows:
            start, end = end, end + num_tokens
            if not identity:
                continue
            own = runs.setdefault(identity, [])
            if own and own[-1][1] == start:
                start = own.pop()[0]
            own.append((start, end))
        if not runs:
            return None
        groups = [_Group(self._adapters[i], own, _index(own)) for i, own in runs.items()]
        return StepAdapters(groups, self._one_by_one)


def _index(runs: Sequence[tuple[int, int]]) -> Tensor | None:
    if len(runs) == 1:
        return None
    return torch.cat([torch.arange(start, end) for start, end in runs])
