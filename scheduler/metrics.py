"""What Prometheus is told of the mesh, in one answer: of scheduler, pipelines, stages and workers.

Made from what GetStatus answers at the time of asking, so nothing is counted twice and a worker
needs no port of its own. Names and meanings are in docs/observability.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from protos import mesh_pb2

Status = mesh_pb2.GetStatusResponse

_STATES = ("busy", "output_wait", "serialise", "input_wait")

# Attribute of the message: (name, help).
_QUEUE_GAUGES = {
    "num_waiting": ("waiting_requests", "Requests in the queue."),
    "num_running": ("running_requests", "Requests that run on a pipeline."),
}
_QUEUE_COUNTERS = {
    "num_accepted": ("accepted_requests", "Requests that were accepted."),
    "num_finished": ("finished_requests", "Requests that ended by themselves."),
    "num_refused": ("refused_requests", "Requests that were refused."),
    "num_aborted": ("aborted_requests", "Requests that were cancelled."),
    "num_failed": ("failed_requests", "Requests that ended with an error."),
    "num_preempted": ("preemptions", "Times that a running request gave its KV up."),
    "generated_tokens": ("generated_tokens", "Tokens that were sampled."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of requests that began."),
    "cached_prompt_tokens": ("cached_prompt_tokens", "Those that the prefix cache saved."),
}
_PIPELINE_GAUGES = {
    "num_running": ("running_requests", "Requests that run on the pipeline."),
    "steps_in_flight": ("steps_in_flight", "Steps under way."),
    "max_steps_in_flight": ("max_steps_in_flight", "Steps that may be under way at a time."),
    "num_blocks": ("kv_blocks", "KV blocks."),
    "num_free_blocks": ("free_kv_blocks", "KV blocks that no request owns."),
    "num_cached_blocks": ("cached_kv_blocks", "Free KV blocks that the prefix cache knows."),
    "num_lacking_tokens": ("lacking_tokens", "Tokens whose KV is still to be rebuilt."),
}
_WORKER_COUNTERS = {
    "steps_executed": ("steps", "Steps that were executed."),
    "rows_executed": ("rows", "Rows of steps that were executed."),
    "tokens_executed": ("tokens", "Tokens of steps that were executed."),
    "messages_sent": ("sent_messages", "Steps and results that were sent on."),
    "bytes_sent": ("sent_bytes", "Bytes of them."),
}
_WORKER_GAUGES = {
    "rss_anon_bytes": ("private_memory_bytes", "Anonymous resident memory of the process."),
    "steps_queued": ("queued_steps", "Steps that wait for the device."),
}


class MeshMetrics:
    """Nothing is kept from one answer to the next."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def expose(self) -> bytes:
        """The text format."""
        registry = CollectorRegistry()
        registry.register(_StatusCollector(self._status()))
        return bytes(generate_latest(registry))


class _StatusCollector(Collector):
    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        yield from _of_scheduler(self._status)
        yield from _of_pipelines(self._status)
        yield from _of_stages(self._status)
        yield from _of_workers(self._status)
        yield _of_experts(self._status)


def _of_scheduler(status: Status) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "stagemesh_mesh_serving", "Whether a pipeline serves.", float(status.mesh.serving)
    )
    for field, (name, text) in _QUEUE_GAUGES.items():
        yield GaugeMetricFamily(
            f"stagemesh_scheduler_{name}", text, float(getattr(status.queue, field))
        )
    for field, (name, text) in _QUEUE_COUNTERS.items():
        yield CounterMetricFamily(
            f"stagemesh_scheduler_{name}", text, float(getattr(status.queue, field))
        )


def _of_pipelines(status: Status) -> Iterator[Metric]:
    pipelines = status.pipelines
    for field, (name, text) in _PIPELINE_GAUGES.items():
        gauge = GaugeMetricFamily(f"stagemesh_pipeline_{name}", text, labels=["pipeline"])
        for pipeline in pipelines:
            gauge.add_metric([pipeline.pipeline_id], getattr(pipeline, field))
        yield gauge
    steps = CounterMetricFamily("stagemesh_pipeline_steps", "Steps done.", labels=["pipeline"])
    unscheduled = CounterMetricFamily(
        "stagemesh_pipeline_unscheduled_seconds",
        "Time for which the pipeline served without a step under way.",
        labels=["pipeline"],
    )
    for pipeline in pipelines:
        steps.add_metric([pipeline.pipeline_id], pipeline.steps_done)
        unscheduled.add_metric([pipeline.pipeline_id], pipeline.unscheduled_ns / 1e9)
    yield steps
    yield unscheduled


def _of_stages(status: Status) -> Iterator[Metric]:
    seconds = CounterMetricFamily(
        "stagemesh_stage_seconds",
        "What the time of the stage's worker in epochs went to; the states add up to it.",
        labels=["pipeline", "stage", "worker", "state"],
    )
    workers = {worker.worker_id: worker for worker in status.workers}
    for pipeline in status.pipelines:
        for stage, worker_id in enumerate(pipeline.worker_ids):
            if worker_id not in workers:
                continue
            stats = workers[worker_id].stats
            for state in _STATES:
                labels = [pipeline.pipeline_id, str(stage), worker_id, state]
                seconds.add_metric(labels, getattr(stats, f"{state}_ns") / 1e9)
    yield seconds


def _of_workers(status: Status) -> Iterator[Metric]:
    for field, (name, text) in _WORKER_COUNTERS.items():
        counter = CounterMetricFamily(f"stagemesh_worker_{name}", text, labels=["worker"])
        for worker in status.workers:
            counter.add_metric([worker.worker_id], getattr(worker.stats, field))
        yield counter
    for field, (name, text) in _WORKER_GAUGES.items():
        gauge = GaugeMetricFamily(f"stagemesh_worker_{name}", text, labels=["worker"])
        for worker in status.workers:
            gauge.add_metric([worker.worker_id], getattr(worker.stats, field))
        yield gauge


def _of_experts(status: Status) -> Metric:
    counter = CounterMetricFamily(
        "stagemesh_expert_tokens",
        "Tokens that the layer's router gave to the expert.",
        labels=["worker", "layer", "expert"],
    )
    for worker in status.workers:
        for layer in worker.stats.routing:
            for expert, tokens in enumerate(layer.tokens):
                counter.add_metric([worker.worker_id, str(layer.layer), str(expert)], tokens)
    return counter
