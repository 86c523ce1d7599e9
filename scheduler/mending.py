"""What it takes to go on after an epoch ended: how long each phase lasted.

the epoch ends -> every stage has its worker -> all have joined -> no KV is lacking
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Mending:
    """The latest of one pipeline. Times are None until the phase before them is over."""

    reason: str
    began_ns: int
    filled_ns: int | None = None
    joined_ns: int | None = None
    rebuilt_ns: int | None = None
    num_lost_stages: int = 0
    num_tokens_rebuilt: int = 0
    num_blocks_moved: int = 0

    @property
    def is_rebuilding(self) -> bool:
        """Whether all that is left to do is the core's."""
        return self.joined_ns is not None and self.rebuilt_ns is None

    @property
    def fill_ns(self) -> int:
        return _between(self.began_ns, self.filled_ns)

    @property
    def join_ns(self) -> int:
        return _between(self.filled_ns, self.joined_ns)

    @property
    def rebuild_ns(self) -> int:
        return _between(self.joined_ns, self.rebuilt_ns)

    def summary(self) -> dict[str, object]:
        """For the log."""
        return {
            "reason": self.reason,
            "fill_ms": round(self.fill_ns / 1e6, 1),
            "join_ms": round(self.join_ns / 1e6, 1),
            "rebuild_ms": round(self.rebuild_ns / 1e6, 1),
            "lost_stages": self.num_lost_stages,
            "tokens_rebuilt": self.num_tokens_rebuilt,
            "blocks_moved": self.num_blocks_moved,
        }


def _between(start_ns: int | None, end_ns: int | None) -> int:
    """0 while it lasts."""
    return 0 if start_ns is None or end_ns is None else end_ns - start_ns
