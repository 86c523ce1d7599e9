"""What a kernel of attention over paged KV is: it plans a step's reading once, then attends.

    T tokens of the step; H query heads, K KV heads, D head dim

How pages are read is a kernel's own business: `stage_worker.padded_attention` gathers contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from stage_worker.kv_cache import KvCache

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Query:
    """One row as attention sees it: its tokens [first, first + num_tokens) of the step stand at
    positions from `start` on, and its whole context is [0, end).

    `slots` [end] are those of the context, on the device of the pages; `blocks` are its block ids
    in order, at least as many as it needs.
    """

    first: int
    num_tokens: int
    start: int
    slots: Tensor
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class Scores:
    """What becomes of a product of query and key: times `scale` (None: D ** -0.5), and with a `cap`
    c it becomes c * tanh(score / c)."""

    scale: float | None = None
    cap: float | None = None

    def factor(self, head_dim: int) -> float:
        return head_dim**-0.5 if self.scale is None else self.scale


PLAIN_SCORES = Scores()


class Attention(Protocol[P]):
    """A kernel. What it plans, P, is known to itself only."""

    def plan(self, rows: Sequence[Query], window: int | None, cache: KvCache) -> P:
        """Once per step for all layers with this window (None: whole context).

        `rows` are at least one and cover the step's tokens in order. A query at position p reads
        [0, p], or the last `window` of them. The pages are not looked at yet.
        """
        ...

    def attend(
        self, queries: Tensor, plan: P, cache: KvCache, layer: int, sinks: Tensor | None = None
    ) -> Tensor:
        """queries: [T, H, D], whose own keys and values are written already -> [T, H * D].

        `sinks` [H], float32, are scores beside those of the keys: they take their share of a
        head's attention, and have no value to give.

        No query may read a value of another sequence or of a stale page, not even under a mask:
        NaN times zero would be NaN.
        """
        ...
