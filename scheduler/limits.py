"""How the mesh is to form, and how patient it is; as the operator set it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MembershipLimits:
    """`num_stages` 0: as many as workers register within `settle_ns` of each other.

    `num_replicas` bounds the pipelines; 0: as many as can be made. `share_workers`: whether one may
    serve two pipelines. `max_model_len` None: what the model and the pipelines' blocks allow.
    """

    num_stages: int = 0
    num_replicas: int = 0
    settle_ns: int = 5_000_000_000
    lease_ns: int = 2_000_000_000
    reconnect_grace_ns: int = 250_000_000
    join_timeout_ns: int = 30_000_000_000
    takeover_after_ns: int = 10_000_000_000
    share_workers: bool = True
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True)
class DriverTimeouts:
    """`canary_interval_s` 0: idle pipelines are left alone."""

    lease_s: float
    join_s: float
    canary_interval_s: float
