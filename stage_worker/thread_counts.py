"""How many threads compute a step: more of them where the other stages of its pipeline are idle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stagemesh.plan import Step

# Before anything was changed.
_USUAL = torch.get_num_threads()


class ThreadCounts:
    """Used on the device thread alone: OpenMP's numbers belong to the thread that sets them."""

    def __init__(self, alone: int) -> None:
        """`alone` 0: steps are computed alike, with whatever number of threads was set."""
        self._alone = alone

    def set_for(self, step: Step) -> None:
        if not self._alone:
            return
        wanted = self._alone if step.alone else _USUAL
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)


@contextmanager
def one_thread() -> Iterator[None]:
    """For work beside the steps, on another thread than theirs: what they have stays as it is. A
    thread that only begins to compute meanwhile would begin with one, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
