"""Meshes and requests for scenarios that are said rather than drawn."""

from __future__ import annotations

from typing import Any

from simulation.arrivals import Arrival
from simulation.clock import MS
from simulation.scenario import PipelineShape, Scenario

from scheduler.core import Request, RequestKey, SchedulerLimits
from stagemesh.sampling import SamplingSpec


def arrival(number: int, num_prompt: int, max_tokens: int, at_ns: int = 0) -> Arrival:
    request = Request(
        key=RequestKey(0, number),
        attempt=0,
        label=f"r{number}",
        prompt_token_ids=tuple((number * 7 + position) % 40 for position in range(num_prompt)),
        output_token_ids=(),
        sampling=SamplingSpec(seed=number),
        max_tokens=max_tokens,
    )
    return Arrival(at_ns, request)


def shape(num_stages: int, num_blocks: int = 256, latency_ns: int = MS) -> PipelineShape:
    return PipelineShape(
        cuts=tuple(range(1, num_stages)),
        num_blocks=num_blocks,
        block_size=4,
        max_model_len=128,
        latencies_ns=(latency_ns,) * num_stages,
        jitter=0.0,
        log_blocks=(num_blocks,) * (num_stages - 1),
    )


def mesh(*shapes: PipelineShape, arrivals: tuple[Arrival, ...], **limits: Any) -> Scenario:
    return Scenario(SchedulerLimits(**limits), shapes, arrivals)
