"""Attention on the CPU: which parts of a step's contexts are read where they lie, which gathered.

    T tokens of the step, R rows of a group, n queries per row, C slots of a row

Long runs of a context that all queries of a row see are read in place. What is left of it, short
runs and positions that some queries see, is copied, together with that of other rows: padded to
one another and masked. A padded slot repeats a slot of its own row, so that no query ever reads a
value of another sequence or of a stale page.

Pages in another type than the queries' are always copied, and turned into it: a piece of a context
at a time, small enough to be still in the processor's cache when it is attended to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stage_worker.attention import PLAIN_SCORES, Query, Scores
from stage_worker.attention_parts import Gathered, Part, Stretch, beside_sinks, merge
from stage_worker.block_runs import runs_of
from stage_worker.kv_cache import KvCache

# A run in a part of its own costs as much as copying this many bytes …
_RUN_BYTES = 256 * 1024
# … and the merging of its results as copying this many slots for each query.
_MERGE_SLOTS = 4
# Another group costs as much as copying this many bytes.
_GROUP_BYTES = 256 * 1024
# Of what is copied at a time: it is to be in a cache still when it is read.
_MAX_COPY_BYTES = 2 * 2**20
# Rows this long attend to themselves in a part that is causal, and leaves half uncomputed.
_MIN_CAUSAL_TOKENS = 64
# Pages in another type: slots of a piece, for few queries and for each of many (its results are
# merged, and must not outweigh it).
_PIECE_SLOTS = 512
_PIECE_SLOTS_PER_QUERY = 4
# No position of a query: nobody sees a slot there.
_NOWHERE = 2**62


@dataclass(frozen=True, slots=True)
class Plan:
    """`tokens` [P] are those that the parts' results are of; None where they are the step's in
    order. `merged`: some have several results.
    """

    parts: Sequence[Part]
    tokens: Tensor | None
    merged: bool


@dataclass(frozen=True, slots=True)
class _Rest:
    """What is gathered of a row: `slots` [C], which its queries see all of, or as far as their
    window and `positions` [C] allow.
    """

    row: Query
    slots: Tensor
    positions: Tensor | None


class CpuAttention:
    """An `Attention`."""

    def __init__(self, scores: Scores = PLAIN_SCORES) -> None:
        self._scores = scores

    def plan(self, rows: Sequence[Query], window: int | None, cache: KvCache) -> Plan:
        planner = _Planner(window, cache, alone=len(rows) == 1)
        for row in rows:
            planner.add(row)
        parts = planner.all_parts()
        tokens = [token for part in parts for token in part.tokens]
        num_tokens = rows[-1].first + rows[-1].num_tokens
        if tokens == list(range(num_tokens)):
            return Plan(parts, None, merged=False)
        return Plan(parts, torch.tensor(tokens), merged=len(tokens) > num_tokens)

    def attend(
        self, queries: Tensor, plan: Plan, cache: KvCache, layer: int, sinks: Tensor | None = None
    ) -> Tensor:
        partials = [part.attend(queries, cache, layer, self._scores) for part in plan.parts]
        if plan.merged:
            assert plan.tokens is not None
            return merge(partials, plan.tokens, len(queries), sinks).flatten(1)
        if sinks is None:
            outputs = [output for output, _ in partials]
        else:
            outputs = [beside_sinks(partial, sinks) for partial in partials]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if plan.tokens is not None:
            joined = torch.empty_like(queries).index_copy_(0, plan.tokens, joined)
        return joined.flatten(1)


class _Planner:
    """Parts of one plan, row by row; with `alone` there is but one row."""

    def __init__(self, window: int | None, cache: KvCache, *, alone: bool) -> None:
        self._window = window
        self._cache = cache
        self._alone = alone
        self._parts: list[Part] = []
        # By number of queries, and whether they see all of it.
        self._rests: dict[tuple[int, bool], list[_Rest]] = defaultdict(list)

    def add(self, row: Query) -> None:
        """Its queries see positions from `first` on between them, and all of them [shared, end)."""
        first, shared, num = 0, 0, row.num_tokens
        if self._window is not None:
            first, shared = max(0, row.start + 1 - self._window), max(0, row.end - self._window)
        stretches, loose = self._stretches(row, shared, row.end if num == 1 else row.start)
        self._parts += stretches
        if not self._cache.in_place:
            loose = self._cut(row, loose)
        if num == 1:
            if len(loose):
                piece = max(1, _MAX_COPY_BYTES // self._cache.slot_bytes)
                pieces = torch.split(loose, piece)
                self._rests[num, True] += [_Rest(row, some, None) for some in pieces]
        elif num >= _MIN_CAUSAL_TOKENS and shared == 0:
            self._parts.append(_gathered(row, row.slots[row.start :], causal=True))
            if len(loose):
                self._parts.append(_gathered(row, loose))
        else:
            rest = _rest(row, range(first, min(shared, row.start)), loose)
            self._rests[num, False].append(rest)

    def all_parts(self) -> list[Part]:
        for rests in self._rests.values():
            groups = _groups(rests, self._cache.slot_bytes)
            self._parts += [_padded(group, self._window, self._cache.dtype) for group in groups]
        return self._parts

    def _stretches(self, row: Query, begin: int, end: int) -> tuple[list[Stretch], Tensor]:
        """The runs of positions [begin, end) that are worth it, and the slots of what is left.

        A run that is all that the step reads is worth it, however short.
        """
        if not self._cache.in_place:
            return [], row.slots[begin:end]
        alone = self._alone and row.num_tokens == 1
        min_slots = _RUN_BYTES // self._cache.slot_bytes + _MERGE_SLOTS * row.num_tokens
        if end - begin < min_slots and not alone:
            return [], row.slots[begin:end]
        runs = runs_of(row.blocks, begin, end, self._cache.block_size_tokens)
        if alone and len(runs) == 1:
            min_slots = 0
        stretches = [Stretch(_tokens(row), run) for run in runs if run.num_slots >= min_slots]
        if not stretches:
            return [], row.slots[begin:end]
        short = [np.arange(*run) for run in runs if run.num_slots < min_slots]
        return stretches, torch.from_numpy(np.concatenate(short)) if short else row.slots[:0]

    def _cut(self, row: Query, loose: Tensor) -> Tensor:
        """Leaves what is no whole piece of slots that all of the row's queries see."""
        size = max(_PIECE_SLOTS, _PIECE_SLOTS_PER_QUERY * row.num_tokens)
        num_whole = len(loose) // size * size
        for piece in loose[:num_whole].view(-1, size):
            self._rests[row.num_tokens, True].append(_Rest(row, piece, None))
        return loose[num_whole:]


def _gathered(row: Query, slots: Tensor, *, causal: bool = False) -> Gathered:
    tokens = _tokens(row)
    return Gathered(tokens, slice(tokens.start, tokens.stop), slots[None], causal=causal)


def _rest(row: Query, edge: range, loose: Tensor) -> _Rest:
    """Of a row of several queries: positions that some see, what all see, and the row's own."""
    slots = [row.slots[edge.start : edge.stop], loose, row.slots[row.start :]]
    positions = [
        torch.arange(edge.start, edge.stop),
        torch.full((len(loose),), row.start),  # all see this one
        torch.arange(row.start, row.end),
    ]
    return _Rest(row, torch.cat(slots), torch.cat(positions))


def _groups(rests: Sequence[_Rest], slot_bytes: int) -> Iterator[list[_Rest]]:
    """Groups whose padding costs no more than another group would, and that are not too large."""
    group: list[_Rest] = []
    num_padded = 0
    for rest in sorted(rests, key=lambda rest: len(rest.slots), reverse=True):
        longest = len(group[0].slots) if group else len(rest.slots)
        num_padded += longest - len(rest.slots)
        copied_bytes = (len(group) + 1) * longest * slot_bytes
        if num_padded * slot_bytes > _GROUP_BYTES or (group and copied_bytes > _MAX_COPY_BYTES):
            yield group
            group, num_padded = [], 0
        group.append(rest)
    yield sorted(group, key=lambda rest: rest.row.first)


def _padded(group: Sequence[_Rest], window: int | None, dtype: torch.dtype) -> Gathered:
    tokens = [token for rest in group for token in _tokens(rest.row)]
    span = range(tokens[0], tokens[0] + len(tokens))
    index = slice(span.start, span.stop) if tokens == list(span) else torch.tensor(tokens)
    slots, mask = _joined(group, window, dtype)
    return Gathered(tokens, index, slots, mask)


def _joined(
    group: Sequence[_Rest], window: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Slots [R, C] and their mask [R, 1, n, C]."""
    each = [rest.slots for rest in group]
    if group[0].positions is None and len(set(map(len, each))) == 1:
        return torch.stack(each), None
    slots = pad_sequence(each, batch_first=True, padding_value=-1)
    seen = slots >= 0
    slots = torch.where(seen, slots, slots[:, :1])
    seen = seen[:, None]
    if group[0].positions is not None:
        positions = [rest.positions for rest in group if rest.positions is not None]
        seen = _seen(group, pad_sequence(positions, True, _NOWHERE), window)
    mask = None
    if not bool(seen.all()):
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)[:, None]
    return slots, mask


def _seen(group: Sequence[_Rest], positions: Tensor, window: int | None) -> Tensor:
    """positions: [R, C] -> [R, n, C], true where a query sees the slot."""
    starts = torch.tensor([rest.row.start for rest in group])
    own = (starts[:, None] + torch.arange(group[0].row.num_tokens))[:, :, None]
    seen = positions[:, None] <= own
    return seen if window is None else seen & (positions[:, None] > own - window)


def _tokens(row: Query) -> range:
    return range(row.first, row.first + row.num_tokens)
