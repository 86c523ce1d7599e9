"""Requests that are to be submitted: oldest first, taken one by one as the stream takes them."""

from __future__ import annotations

from bisect import bisect_left, insort

from gateway.held_request import HeldRequest


def _age(held: HeldRequest) -> int:
    return held.number


class Backlog:
    """Holds no more than the gateway does: whoever ends is discarded."""

    def __init__(self) -> None:
        self._requests: list[HeldRequest] = []

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, held: HeldRequest) -> None:
        """One that is in it already stays where it is."""
        if not self._has(held):
            insort(self._requests, held, key=_age)

    def discard(self, held: HeldRequest) -> None:
        if self._has(held):
            del self._requests[self._place(held)]

    def pop(self) -> HeldRequest | None:
        """The oldest."""
        return self._requests.pop(0) if self._requests else None

    def _has(self, held: HeldRequest) -> bool:
        place = self._place(held)
        return place < len(self._requests) and self._requests[place] is held

    def _place(self, held: HeldRequest) -> int:
        return bisect_left(self._requests, held.number, key=_age)
