"""What Prometheus is told of the gateway, and of the scheduler's counters at the time of asking."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gateway.mesh_session import SchedulerLoad

_LATENCY_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)


class GatewayMetrics:
    """One per gateway, with a registry of its own, so that several may live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "stagemesh_requests",
            "Generations by how they ended: stop, length, cancelled, or the code of an error.",
            ["outcome"],
            registry=registry,
        )
        self.in_progress = Gauge(
            "stagemesh_requests_in_progress",
            "Generations that the gateway holds.",
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "stagemesh_prompt_tokens", "Prompt tokens of finished generations.", registry=registry
        )
        self.cached_prompt_tokens = Counter(
            "stagemesh_cached_prompt_tokens",
            "Prompt tokens that the prefix cache saved.",
            registry=registry,
        )
        self.generated_tokens = Counter(
            "stagemesh_generated_tokens", "Tokens that went out.", registry=registry
        )
        self.first_token_s = self._histogram(
            "stagemesh_time_to_first_token_seconds", "From acceptance to the first token."
        )
        self.inter_token_s = self._histogram(
            "stagemesh_inter_token_latency_seconds", "Between tokens of one generation."
        )
        self.queue_s = self._histogram(
            "stagemesh_queue_seconds", "In the scheduler's queue, of finished generations."
        )
        self.total_s = self._histogram(
            "stagemesh_request_seconds", "From acceptance to the end, of finished generations."
        )
        self._load = {
            name: Gauge(f"stagemesh_scheduler_{name}", help_text, registry=registry)
            for name, help_text in _LOAD_GAUGES.items()
        }

    def _histogram(self, name: str, help_text: str) -> Histogram:
        return Histogram(name, help_text, buckets=_LATENCY_BUCKETS_S, registry=self.registry)

    def expose(self, load: SchedulerLoad | None) -> bytes:
        """The text format; gauges of the scheduler are NaN where it did not answer."""
        for name, gauge in self._load.items():
            gauge.set(getattr(load, _field(name)) if load is not None else float("nan"))
        return bytes(generate_latest(self.registry))


_LOAD_GAUGES = {
    "waiting_requests": "Requests in the scheduler's queue.",
    "running_requests": "Requests that the scheduler is serving.",
    "kv_blocks": "KV blocks of all pipelines.",
    "free_kv_blocks": "KV blocks that no request owns.",
    "cached_kv_blocks": "Free KV blocks whose content the prefix cache still knows.",
    "preempted_requests": "Preemptions since the scheduler started.",
}


def _field(gauge: str) -> str:
    return "num_" + gauge.removesuffix("_requests").replace("kv_", "")
