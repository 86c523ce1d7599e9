"""Whose pages are in a worker's memory: of at most two pipelines, one from either end.

What a pipeline had here stays its own while it is in no epoch, until another one joins at its end,
or layers are loaded. If the pipeline at the other end grows into it meanwhile, the part that is
left is known here, since pages are given to other workers from that part only. Which blocks are
valid when the pipeline comes back is the scheduler's business: it plans for both, so that it knows
what was overwritten, and a range may grow again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stage_worker.block_ranges import PipelineBlocks
from stage_worker.span_holder import HeldSpan


@dataclass(frozen=True, slots=True)
class KvClaim:
    """What a pipeline may count on: these blocks of the span's pages."""

    pipeline_id: str
    held: HeldSpan
    blocks: PipelineBlocks

    @property
    def from_end(self) -> bool:
        return self.blocks.from_end


class KvClaims:
    def __init__(self) -> None:
        self._claims: tuple[KvClaim, ...] = ()

    def __bool__(self) -> bool:
        return bool(self._claims)

    def of(self, pipeline_id: str) -> KvClaim | None:
        return next((each for each in self._claims if each.pipeline_id == pipeline_id), None)

    def has_kv(self, claim: KvClaim) -> bool:
        """Whether what the pipeline held before lies at the same end of the same pages."""
        before = self.of(claim.pipeline_id)
        return (
            before is not None and before.held == claim.held and before.from_end == claim.from_end
        )

    def take(self, claim: KvClaim) -> None:
        """The pipeline's from now on. What another one had at this end is forgotten, and so is what
        this one had at the other; what another one has there is left as far as it is beside."""
        others = [
            replace(other, blocks=other.blocks.beside(claim.blocks))
            for other in self._claims
            if other.pipeline_id != claim.pipeline_id and other.from_end != claim.from_end
        ]
        self._claims = (*others, claim)

    def clear(self) -> None:
        self._claims = ()
