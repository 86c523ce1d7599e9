"""Whether the ranks of a worker have the experts that they were told to fetch.

Each says so in memory that all ranks see, and not by a message: the first rank looks before a step,
which costs reading a word of each, and no answer comes between those to its commands. Knows nothing
of what is fetched.
"""

from __future__ import annotations

import mmap
import threading

from stage_worker.rank_options import rank_words

_WORD = 2  # of a rank's line


class FetchReports:
    """A fetch has a number, from 1 on, whatever stage it is for. A rank's word is the number of the
    last one that it is done with; the negative of it, where that failed.

    `memory`: the page that ranks share, zero before any of them begins.
    """

    def __init__(self, size: int = 1, memory: mmap.mmap | None = None) -> None:
        self._words = rank_words(memory, size, _WORD)
        self._number = 0
        self._telling = threading.Lock()

    def begin(self) -> int:
        """A new fetch's number. By the first rank, which gives them all."""
        self._number += 1
        return self._number

    def tell(self, rank: int, number: int, is_fetched: bool) -> None:
        """By the rank itself, on any thread. One that was given up and comes late says nothing."""
        with self._telling:
            if number > abs(self._words[rank]):
                self._words[rank] = number if is_fetched else -number

    def outcome(self, number: int) -> bool | None:
        """Whether every rank has fetched it; None while one of them is not done."""
        words = self._words.tolist()
        if any(abs(word) != number for word in words):
            return None
        return all(word == number for word in words)
