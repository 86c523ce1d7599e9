"""Where a worker stands in an epoch, and whom it tells of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from stagemesh.errors import StageMeshError
from stagemesh.plan import Epoch
from stagemesh.transport import PING_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class PageOrigin:
    """Who held the stage before, and the blocks whose pages are wanted."""

    address: str
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker stands in an epoch. Blocks [0, num_blocks) are the pipeline's: the first ones
    of the worker, or the last ones; [0, num_log_blocks) are logged (None: what there is room for).

    With `pages` they are fetched before the epoch counts as joined.
    """

    pipeline_id: str
    epoch: Epoch
    stage: int
    num_stages: int
    next_address: str
    num_blocks: int
    keep_kv: bool
    pages: PageOrigin | None = None
    from_end: bool = False
    num_log_blocks: int | None = None

    @property
    def key(self) -> tuple[str, Epoch]:
        return self.pipeline_id, self.epoch


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a worker waits: for signs of life of a neighbour, and for a step, at the least."""

    ping_timeout_s: float = PING_TIMEOUT_S
    step_timeout_s: float = 2.0


class EpochReports(Protocol):
    """Whom a member tells."""

    def joined(self, place: Place, has_pages: bool) -> None: ...
    def broken(self, place: Place, error: StageMeshError, peer_address: str) -> None: ...
