"""How long requests wait: until their deadline, or less where the operator says so.

What they end with says whether the mesh served when their time was up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from gateway.held_request import HeldRequest
from stagemesh.errors import MeshUnavailable, RequestDeadlineExceeded, StageMeshError

_MIN_RETRY_S = 1.0
_MAX_RETRY_S = 30.0

End = Callable[[HeldRequest, StageMeshError], None]


class Patience:
    """`end` is called with whoever's time is up. The mesh is away until it is said to serve."""

    def __init__(self, max_unavailable_s: float | None, end: End) -> None:
        self._max_unavailable_s = max_unavailable_s
        self._end = end
        self._away_since_s: float | None = None
        self._why = ""

    def begin(self, held: HeldRequest) -> None:
        """Sets the timers of a request that is held from now on."""
        deadline_s, margin_s = held.submission.deadline_s, held.submission.margin_s
        if deadline_s is not None:
            held.ring_at("deadline", deadline_s, lambda: self._end(held, self.deadline_error()))
            if margin_s:
                held.ring_at("margin", deadline_s - margin_s, lambda: self._end_if_away(held))
        if self._away_since_s is not None:
            self._limit(held)

    def mesh_is_away(self, why: str, all_held: Iterable[HeldRequest]) -> None:
        self._why = why
        if self._away_since_s is None:
            self._away_since_s = _now_s()
            for held in tuple(all_held):
                self._limit(held)

    def mesh_serves(self, all_held: Iterable[HeldRequest]) -> None:
        self._away_since_s = None
        for held in all_held:
            held.unring("unavailable")

    def deadline_error(self) -> StageMeshError:
        """What a request ends with whose deadline comes now."""
        if self._away_since_s is None:
            return RequestDeadlineExceeded("the deadline passed before the request was finished")
        return self._away_error("the deadline came")

    def _limit(self, held: HeldRequest) -> None:
        if self._max_unavailable_s is None:
            return
        until_s = _now_s() + self._max_unavailable_s
        what = f"the mesh was away for {self._max_unavailable_s:g} s"
        held.ring_at("unavailable", until_s, lambda: self._end(held, self._away_error(what)))

    def _end_if_away(self, held: HeldRequest) -> None:
        if self._away_since_s is not None:
            self._end(held, self.deadline_error())

    def _away_error(self, what: str) -> MeshUnavailable:
        """An outage is expected to last about as long again as it has lasted."""
        away_s = _now_s() - (self._away_since_s or _now_s())
        retry_s = min(max(away_s, _MIN_RETRY_S), _MAX_RETRY_S)
        return MeshUnavailable(
            f"{what} while no pipeline served: {self._why}", retry_after_s=retry_s
        )


def _now_s() -> float:
    return asyncio.get_running_loop().time()
