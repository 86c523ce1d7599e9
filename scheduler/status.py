"""GetStatus: everything there is to know of the mesh from outside, as protobuf."""

from __future__ import annotations

from protos import mesh_pb2
from scheduler.convert import stats_to_proto
from scheduler.core import CoreStats, PipelineStats
from scheduler.gateways import view_to_proto
from scheduler.membership import Membership
from scheduler.mending import Mending
from scheduler.mesh_view import MeshView
from scheduler.pipelines import MeshPipeline
from scheduler.workers import Worker, WorkerPhase
from stagemesh import wire
from stagemesh.wire_steps import hop_timing_to_proto

_STATES = {
    WorkerPhase.IDLE: mesh_pb2.WORKER_STATE_IDLE,
    WorkerPhase.LOADING: mesh_pb2.WORKER_STATE_LOADING,
    WorkerPhase.READY: mesh_pb2.WORKER_STATE_READY,
    WorkerPhase.SERVING: mesh_pb2.WORKER_STATE_SERVING,
}


def status_of(
    membership: Membership,
    stats: CoreStats,
    view: MeshView,
    num_gateways: int,
    start_ns: int,
    now_ns: int,
) -> mesh_pb2.GetStatusResponse:
    in_core = {pipeline.pipeline_id: pipeline for pipeline in stats.pipelines}
    return mesh_pb2.GetStatusResponse(
        term=membership.term,
        mesh=view_to_proto(view),
        workers=[_worker(worker, now_ns) for worker in membership.workers],
        pipelines=[_pipeline(p, in_core.get(p.pipeline_id)) for p in membership.pipelines],
        queue=_queue(stats),
        num_gateways=num_gateways,
        uptime_ns=now_ns - start_ns,
    )


def _worker(worker: Worker, now_ns: int) -> mesh_pb2.WorkerStatus:
    registration, loaded = worker.registration, worker.loaded
    span = worker.loading or (loaded.span if loaded else None)
    return mesh_pb2.WorkerStatus(
        worker_id=registration.worker_id,
        incarnation=registration.incarnation,
        address=registration.address,
        state=_STATES[worker.phase],
        span=wire.span_to_proto(span) if span else None,
        device=registration.device,
        dtype=wire.dtype_to_proto(registration.dtype),
        pid=registration.pid,
        num_blocks=loaded.num_blocks if loaded else 0,
        weight_bytes=loaded.weight_bytes if loaded else 0,
        stats=stats_to_proto(worker.stats),
        load_fraction=worker.load_fraction if worker.loading else 0.0,
        draining=worker.is_draining,
        error=_trouble(worker, now_ns),
        tensor_parallel=registration.tensor_parallel,
    )


def _trouble(worker: Worker, now_ns: int) -> str:
    if worker.error is not None:
        return str(worker.error)
    if worker.is_aside(now_ns):
        seconds = (worker.conduct.aside_until_ns - now_ns) // 10**9
        return f"failed several times in a row; others are preferred for {seconds} s"
    if worker.too_large is not None:
        return f"its memory does not hold {worker.too_large.num_layers} layers"
    return ""


def _pipeline(pipeline: MeshPipeline, stats: PipelineStats | None) -> mesh_pb2.PipelineStatus:
    """A place that nobody holds is an empty worker id."""
    status = mesh_pb2.PipelineStatus(
        pipeline_id=pipeline.pipeline_id,
        epoch=wire.epoch_to_proto(pipeline.epoch),
        worker_ids=[worker.worker_id if worker else "" for worker in pipeline.workers],
        serving=pipeline.is_serving,
        mending=_mending(pipeline.mending) if pipeline.mending else None,
    )
    if stats is not None:
        status.num_blocks = stats.num_blocks
        status.num_free_blocks = stats.num_free_blocks
        status.num_cached_blocks = stats.num_cached_blocks
        status.num_running = stats.num_running
        status.steps_in_flight = stats.steps_in_flight
        status.steps_done = stats.steps_done
        status.num_lacking_tokens = stats.num_lacking_tokens
        status.unscheduled_ns = stats.unscheduled_ns
        status.max_steps_in_flight = stats.max_steps_in_flight
        status.mean_timings.extend(hop_timing_to_proto(each) for each in stats.mean_timings)
    return status


def _mending(mending: Mending) -> mesh_pb2.MendingStatus:
    return mesh_pb2.MendingStatus(
        reason=mending.reason,
        fill_ns=mending.fill_ns,
        join_ns=mending.join_ns,
        rebuild_ns=mending.rebuild_ns,
        num_tokens_rebuilt=mending.num_tokens_rebuilt,
        num_blocks_moved=mending.num_blocks_moved,
    )


def _queue(stats: CoreStats) -> mesh_pb2.QueueStatus:
    return mesh_pb2.QueueStatus(
        num_waiting=stats.num_waiting,
        num_running=stats.num_running,
        num_accepted=stats.num_accepted,
        num_finished=stats.num_finished,
        num_refused=stats.num_refused,
        num_aborted=stats.num_aborted,
        num_failed=stats.num_failed,
        num_preempted=stats.num_preempted,
        generated_tokens=stats.generated_tokens,
        prompt_tokens=stats.prompt_tokens,
        cached_prompt_tokens=stats.cached_prompt_tokens,
        generated_tokens_per_s=stats.generated_tokens_per_s,
        prompt_tokens_per_s=stats.prompt_tokens_per_s,
    )
