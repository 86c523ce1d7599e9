"""What others are told of the mesh as a whole: does it serve, what, and if not, why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scheduler.membership import Membership
from scheduler.pipelines import MeshPipeline, Phase
from scheduler.workers import Worker


@dataclass(frozen=True, slots=True)
class MeshView:
    """See MeshState in mesh.proto."""

    serving: bool
    model: str
    identity: str
    max_model_len: int
    num_pipelines: int
    detail: str
    adapters: Mapping[str, str] = field(default_factory=dict)


def view_of(membership: Membership) -> MeshView:
    """`max_model_len` is of the roomiest pipeline; it stays known while a pipeline is being mended,
    since requests wait for it."""
    pipelines = membership.pipelines
    serving = [pipeline for pipeline in pipelines if pipeline.is_serving]
    known = [pipeline for pipeline in pipelines if pipeline.has_served]
    summary = membership.model.summary
    return MeshView(
        serving=bool(serving),
        model=summary.name if summary else "",
        identity=membership.model.identity if known else "",
        max_model_len=max((_capacity(membership, each) for each in known), default=0),
        num_pipelines=len(serving),
        detail=_detail(membership.workers, pipelines),
        adapters=membership.model.adapters,
    )


def _capacity(membership: Membership, pipeline: MeshPipeline) -> int:
    """Longest sequence that was held, in tokens."""
    return min(membership.max_model_len, pipeline.num_tokens_served)


def _detail(workers: Sequence[Worker], pipelines: Sequence[MeshPipeline]) -> str:
    """Empty where all is well."""
    reasons = [reason for pipeline in pipelines if (reason := _waits_for(pipeline))]
    reasons += [f"worker {each.worker_id}: {each.error}" for each in workers if each.error]
    if reasons or pipelines:
        return "; ".join(reasons)
    if not workers:
        return "no worker has registered"
    return f"{len(workers)} workers are here, no pipeline can be made of them yet"


def _waits_for(pipeline: MeshPipeline) -> str:
    if pipeline.is_serving:
        return ""
    stages = range(pipeline.num_stages)
    ready = [stage for stage in stages if pipeline.is_ready(stage)]
    count = f"{len(ready)} of {pipeline.num_stages} stages"
    if len(ready) < pipeline.num_stages:
        lacking = ", ".join(_lack(pipeline, stage) for stage in stages if stage not in ready)
        return f"{count}: {lacking}"
    why = f" ({pipeline.last_error})" if pipeline.last_error else ""
    doing = "joining" if pipeline.phase is Phase.JOINING else "about to join"
    return f"{count}: {doing} epoch {pipeline.epoch.n}{why}"


def _lack(pipeline: MeshPipeline, stage: int) -> str:
    span, worker = pipeline.spans[stage], pipeline.workers[stage]
    layers = f"layers {span.start}:{span.end}"
    if worker is None:
        return f"waiting for {layers}"
    if worker.session is None:
        return f"waiting for worker {worker.worker_id} with {layers}"
    return f"worker {worker.worker_id} loads {layers}"
