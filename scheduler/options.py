"""Options of a scheduler process."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.core import SchedulerLimits
from scheduler.limits import DriverTimeouts, MembershipLimits
from stagemesh.addresses import split_address
from stagemesh.errors import ConfigError
from stagemesh.option_values import Kind
from stagemesh.options import check_options, option


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """Raises ConfigError, naming the option."""

    listen: str = option("0.0.0.0:50050", help="address to listen on; port 0 picks a free one")
    advertise: str = option(
        "", help="host or host:port at which workers reach the scheduler, if not where it listens"
    )
    num_stages: int = option(
        0,
        flag="stages",
        help="stages of a pipeline; 0: as many as workers come up first",
        minimum=0,
        maximum=1024,
    )
    num_replicas: int = option(
        0,
        flag="replicas",
        help="pipelines at most, workers beyond them are spares; 0: as many as can be made",
        minimum=0,
        maximum=1024,
    )
    settle_s: float = option(
        5.0,
        help="without --stages: how long after the last worker came the first pipeline is made",
        kind=Kind.DURATION,
        minimum=0.0,
    )
    heartbeat_interval_s: float = option(
        0.5,
        help="how often workers and gateways show that they live",
        kind=Kind.DURATION,
        minimum=0.01,
    )
    lease_s: float = option(
        2.0,
        help="after this long without a word a worker or gateway is lost",
        kind=Kind.DURATION,
        minimum=0.02,
    )
    reconnect_grace_s: float = option(
        0.25,
        help="how long a worker whose connection broke keeps its place",
        kind=Kind.DURATION,
        minimum=0.0,
    )
    join_timeout_s: float = option(
        30.0,
        help="how long the workers of a pipeline may take to join",
        kind=Kind.DURATION,
        minimum=0.1,
    )
    takeover_after_s: float = option(
        10.0,
        help="how long a lost worker's place waits for somebody before the others take its layers",
        kind=Kind.DURATION,
        minimum=0.0,
    )
    share_workers: bool = option(
        True, help="a replica's worker stands in for a lost one of another replica, beside its own"
    )
    canary_interval_s: float = option(
        5.0,
        help="an idle pipeline computes one token this often, to see that it serves; 0: never",
        kind=Kind.DURATION,
        minimum=0.0,
    )
    max_waiting: int = option(
        1024, help="requests that may wait; more are refused at once", minimum=1
    )
    max_running: int = option(256, help="requests that run at a time, per pipeline", minimum=1)
    max_step_tokens: int = option(512, help="tokens in a step at most", minimum=1)
    max_chunk_tokens: int | None = option(
        None, help="tokens of one prompt in a step at most", minimum=1
    )
    max_steps_in_flight: int | None = option(
        None, help="steps under way in a pipeline; else as many as stages", minimum=1, maximum=32
    )
    max_model_len: int | None = option(
        None, help="longest prompt and output together; else what the model allows", minimum=2
    )
    prefix_cache: bool = option(True, help="requests share the KV of equal beginnings")
    metrics_listen: str = option(
        "", help="address at which Prometheus finds /metrics of the whole mesh; empty: none"
    )

    def __post_init__(self) -> None:
        check_options(self)
        for flag, address in (("--listen", self.listen), ("--metrics-listen", self.metrics_listen)):
            try:
                split_address(address or self.listen)
            except ConfigError as error:
                raise ConfigError(f"{flag}: {error}") from None
        if self.lease_s < 2 * self.heartbeat_interval_s:
            raise ConfigError(
                f"--lease must be at least twice --heartbeat-interval, "
                f"{2 * self.heartbeat_interval_s:g} s, not {self.lease_s:g} s"
            )

    def core_limits(self) -> SchedulerLimits:
        return SchedulerLimits(
            max_waiting_requests=self.max_waiting,
            max_running_requests=self.max_running,
            max_step_tokens=self.max_step_tokens,
            max_chunk_tokens=self.max_chunk_tokens,
            prefix_cache=self.prefix_cache,
            max_steps_in_flight=self.max_steps_in_flight,
        )

    def membership_limits(self) -> MembershipLimits:
        return MembershipLimits(
            num_stages=self.num_stages,
            num_replicas=self.num_replicas,
            settle_ns=round(self.settle_s * 1e9),
            lease_ns=round(self.lease_s * 1e9),
            reconnect_grace_ns=round(self.reconnect_grace_s * 1e9),
            join_timeout_ns=round(self.join_timeout_s * 1e9),
            takeover_after_ns=round(self.takeover_after_s * 1e9),
            share_workers=self.share_workers,
            max_model_len=self.max_model_len,
        )

    def driver_timeouts(self) -> DriverTimeouts:
        return DriverTimeouts(
            lease_s=self.lease_s,
            join_s=self.join_timeout_s,
            canary_interval_s=self.canary_interval_s,
        )
