"""The last rung: the layers of a pipeline that nobody completes, cut anew over those who are left.

Costs everything that was computed, so it is done only after a while without any candidate, and
never because somebody came: who comes to a pipeline that serves is a spare, or part of a replica.
Pure functions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from scheduler.pipelines import MeshPipeline
from scheduler.placement import StageCosts
from scheduler.workers import Worker
from stagemesh.plan import Span

# Of the blocks that the pipeline had, those for which there must be room after the cut.
_MIN_BLOCKS_SHARE = 4

Assignment = list[tuple[Worker, Span]]


def recut(
    pipeline: MeshPipeline, workers: Collection[Worker], costs: StageCosts
) -> Assignment | None:
    """Who holds what instead, in the order of the stages; None where memory does not allow it."""
    team = [worker for worker in pipeline.members if worker.session is not None]
    team = [worker for worker in team if not worker.is_draining and not worker.is_shared]
    team += [worker for worker in workers if worker.is_free]
    team.sort(key=lambda worker: _first_layer(worker, costs.num_layers))
    rooms = [_Room.of(worker, pipeline, workers, costs) for worker in team]
    return _lightest(costs, team, rooms)


def _first_layer(worker: Worker, num_layers: int) -> int:
    span = worker.registration.fixed_span or (worker.loaded.span if worker.loaded else None)
    return span.start if span else num_layers


@dataclass(frozen=True, slots=True)
class _Room:
    """What one worker could hold instead of what it holds."""

    worker: Worker
    memory_bytes: int
    # Bytes in memory per byte as stored.
    scale: float
    kv_bytes_per_layer: float

    @classmethod
    def of(
        cls,
        worker: Worker,
        pipeline: MeshPipeline,
        workers: Collection[Worker],
        costs: StageCosts,
    ) -> _Room:
        """What it holds it gives up. A worker of which it is not known what is free has no more."""
        loads = [each.loaded for each in workers if each.loaded]
        scale = max((x.weight_bytes / costs.memory_bytes(x.span) for x in loads), default=1.0)
        kv_bytes = max((x.kv_block_bytes / x.span.num_layers for x in loads), default=0.0)
        size = max((x.block_size_tokens for x in loads), default=1)
        num_blocks = max(1, pipeline.num_tokens_served // size // _MIN_BLOCKS_SHARE)
        free = worker.stats.available_memory_bytes or worker.registration.available_memory_bytes
        own = worker.loaded
        held = own.weight_bytes + own.kv_block_bytes * own.num_blocks if own else 0
        return cls(worker, free + held, scale, kv_bytes * num_blocks)

    def takes(self, span: Span, costs: StageCosts) -> bool:
        if self.worker.suits(span) is None:
            return False
        weight_bytes = costs.memory_bytes(span) * self.scale
        return weight_bytes + span.num_layers * self.kv_bytes_per_layer <= self.memory_bytes


def _lightest(
    costs: StageCosts, team: Sequence[Worker], rooms: Sequence[_Room]
) -> Assignment | None:
    """The slowest stage is as fast as can be, then the costs are as even as can be. Workers keep
    their order; some may be left over. Dynamic programming over (workers, layers)."""
    best: dict[int, tuple[int, int, Assignment]] = {0: (0, 0, [])}
    for worker, room in zip(team, rooms, strict=True):
        longer = dict(best)
        for start, (slowest, unevenness, assigned) in best.items():
            for end in range(start + 1, costs.num_layers + 1):
                span = Span(start, end)
                read_bytes = costs.read_bytes(span)
                rank = (max(slowest, read_bytes), unevenness + read_bytes**2)
                is_better = end not in longer or rank < longer[end][:2]
                if is_better and room.takes(span, costs):
                    longer[end] = (*rank, [*assigned, (worker, span)])
        best = longer
    found = best.get(costs.num_layers)
    return found[2] if found else None
