"""A worker as the scheduler sees it: who it is, what it holds, when it was last heard of."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING

from scheduler.messages import LoadedSpan, Registration
from stagemesh.errors import StageMeshError
from stagemesh.plan import Span

if TYPE_CHECKING:
    from scheduler.pipelines import MeshPipeline


# One pipeline's blocks lie at the start of a worker's memory, another's at its end.
MAX_TENANTS = 2


class WorkerPhase(Enum):
    IDLE = "idle"
    LOADING = "loading"
    READY = "ready"
    SERVING = "serving"


class Suits(IntEnum):
    """How soon a worker could serve a span: the lower, the sooner."""

    HOLDS = 0
    LOADS = 1
    IS_FIXED = 2
    MAY_LOAD = 3


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """What a worker counts of itself; see WorkerStats in mesh.proto."""

    rss_anon_bytes: int = 0
    steps_executed: int = 0
    rows_executed: int = 0
    tokens_executed: int = 0
    compute_ns: int = 0
    idle_ns: int = 0
    steps_queued: int = 0
    bytes_sent: int = 0
    messages_sent: int = 0
    sequences_held: int = 0
    available_memory_bytes: int = 0
    blocks_received: int = 0
    busy_ns: int = 0
    output_wait_ns: int = 0
    serialise_ns: int = 0
    input_wait_ns: int = 0
    # (layer, tokens given to each expert)
    routing: tuple[tuple[int, tuple[int, ...]], ...] = ()


@dataclass(slots=True)
class Conduct:
    """How a worker did so far, whichever of its processes; kept while it is away."""

    # Epochs in a row that ended through it.
    num_failures: int = 0
    num_times_aside: int = 0
    # Until then others are preferred to it.
    aside_until_ns: int = 0


@dataclass(frozen=True, slots=True)
class Tenancy:
    """A pipeline's claim to a part of a worker's memory: from its start or from its end."""

    pipeline: MeshPipeline
    from_end: bool


@dataclass(slots=True, eq=False)
class Worker:
    """A member of the mesh. `session` is None while its stream is broken and its lease runs on."""

    registration: Registration
    session: int | None
    heard_ns: int
    number: int
    conduct: Conduct = field(default_factory=Conduct)
    loaded: LoadedSpan | None = None
    loading: Span | None = None
    load_fraction: float = 0.0
    # In the order in which they came. A pipeline that has moved elsewhere stays until its KV has.
    tenancies: list[Tenancy] = field(default_factory=list)
    # Why it cannot be used; it stays a member that does nothing.
    error: StageMeshError | None = None
    # Layers that did not fit its memory; no more are given to it.
    too_large: Span | None = None
    # Kept for the place of a worker that is drained.
    is_reserved: bool = False
    is_draining: bool = False
    # Since when its stream is broken.
    away_ns: int | None = None
    stats: WorkerStats = field(default_factory=WorkerStats)

    @property
    def worker_id(self) -> str:
        return self.registration.worker_id

    @property
    def is_free(self) -> bool:
        """Whether it may be given a place, and has none."""
        is_taken = bool(self.tenancies) or self.is_reserved or self.is_draining
        return self.session is not None and self.error is None and not is_taken

    @property
    def pipelines(self) -> list[MeshPipeline]:
        """Where it has a place."""
        return [each.pipeline for each in self.tenancies if self in each.pipeline.workers]

    @property
    def is_shared(self) -> bool:
        return len(self.tenancies) == MAX_TENANTS

    def is_aside(self, now_ns: int) -> bool:
        return now_ns < self.conduct.aside_until_ns

    @property
    def phase(self) -> WorkerPhase:
        if self.loading is not None:
            return WorkerPhase.LOADING
        if self.loaded is None:
            return WorkerPhase.IDLE
        is_serving = any(pipeline.is_serving for pipeline in self.pipelines)
        return WorkerPhase.SERVING if is_serving else WorkerPhase.READY

    # ---- whose its memory is -------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """What each of its pipelines may have; 0 while nothing is loaded."""
        return self.loaded.num_blocks // self._num_shares if self.loaded else 0

    @property
    def num_log_blocks(self) -> int:
        return self.loaded.num_log_blocks // self._num_shares if self.loaded else 0

    @property
    def _num_shares(self) -> int:
        return max(1, len(self.tenancies))

    def end_of(self, pipeline: MeshPipeline) -> bool | None:
        """Whether the pipeline's blocks lie from the end; None where it has none here."""
        ends = (each.from_end for each in self.tenancies if each.pipeline is pipeline)
        return next(ends, None)

    def let_in(self, pipeline: MeshPipeline, preferred_end: bool | None) -> None:
        """Takes the pipeline in at an end that is free, the preferred one if it is."""
        assert len(self.tenancies) < MAX_TENANTS
        assert self.end_of(pipeline) is None
        taken = {each.from_end for each in self.tenancies}
        wanted = False if preferred_end is None else preferred_end
        self.tenancies.append(Tenancy(pipeline, not wanted if wanted in taken else wanted))

    def let_go(self, pipeline: MeshPipeline) -> None:
        self.tenancies = [each for each in self.tenancies if each.pipeline is not pipeline]

    # ---- what it holds -------------------------------------------------------------------------

    def holds(self, span: Span) -> bool:
        return self.loaded is not None and self.loaded.span == span

    def suits(self, span: Span) -> Suits | None:
        """None: not at all."""
        if self.registration.fixed_span not in (None, span):
            return None
        if self.holds(span):
            return Suits.HOLDS
        if self.too_large is not None and span.num_layers >= self.too_large.num_layers:
            return None
        if self.loading == span:
            return Suits.LOADS
        is_fixed = self.registration.fixed_span == span
        return Suits.IS_FIXED if is_fixed else Suits.MAY_LOAD
