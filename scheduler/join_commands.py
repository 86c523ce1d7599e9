"""What each member of a pipeline is told when an epoch begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.messages import JoinEpoch
from scheduler.workers import Worker

if TYPE_CHECKING:
    from scheduler.pipelines import MeshPipeline


def join_commands(pipeline: MeshPipeline) -> list[JoinEpoch]:
    """In the order of the stages, all of which have somebody."""
    members = pipeline.members
    next_addresses = [worker.registration.address for worker in members[1:]]
    next_addresses.append(members[-1].registration.scheduler_address)
    return [
        _command(pipeline, stage, worker, next_address)
        for stage, (worker, next_address) in enumerate(zip(members, next_addresses, strict=True))
    ]


def _command(pipeline: MeshPipeline, stage: int, worker: Worker, next_address: str) -> JoinEpoch:
    others = [other for other in worker.pipelines if other is not pipeline]
    assert not any(other.exceeds(worker) for other in others), "two pipelines' blocks would meet"
    room = pipeline.epoch_room
    return JoinEpoch(
        pipeline_id=pipeline.pipeline_id,
        epoch=pipeline.epoch,
        stage=stage,
        num_stages=pipeline.num_stages,
        next_address=next_address,
        num_blocks=room.num_blocks,
        keep_kv=pipeline.holders.holds(stage, worker),
        pages_from=pipeline.handovers.address(stage),
        from_end=bool(worker.end_of(pipeline)),
        num_log_blocks=room.num_log_blocks[stage],
    )
