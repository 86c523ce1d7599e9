"""What a worker is doing, in a word, as `status` and `up` show it."""

from __future__ import annotations

from protos import mesh_pb2


def is_spare(worker: mesh_pb2.WorkerStatus, status: mesh_pb2.GetStatusResponse) -> bool:
    """There are pipelines, and none needs it."""
    is_free = worker.state in (mesh_pb2.WORKER_STATE_IDLE, mesh_pb2.WORKER_STATE_READY)
    placed = {worker_id for pipeline in status.pipelines for worker_id in pipeline.worker_ids}
    return is_free and bool(status.pipelines) and worker.worker_id not in placed


def state_word(worker: mesh_pb2.WorkerStatus, status: mesh_pb2.GetStatusResponse) -> str:
    if worker.error:
        return "set aside"
    if worker.draining:
        return "draining"
    if worker.state == mesh_pb2.WORKER_STATE_LOADING:
        return f"loading {worker.load_fraction:.0%}"
    if is_spare(worker, status):
        return "spare"
    return mesh_pb2.WorkerState.Name(worker.state).removeprefix("WORKER_STATE_").lower()
