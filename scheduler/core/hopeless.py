"""Requests that no pipeline will ever serve, and why."""

from __future__ import annotations

from collections.abc import Collection

from scheduler.core.pipeline import Pipeline
from scheduler.core.sequence import Sequence
from stagemesh.errors import (
    ContextLengthExceeded,
    MeshUnavailable,
    ModelNotFound,
    StageMeshError,
)


def why_hopeless(
    sequence: Sequence, pipelines: Collection[Pipeline], max_capacity: int
) -> StageMeshError | None:
    """None while it may run: also where there is no pipeline, and `max_capacity` is 0."""
    adapter, num_tokens = sequence.request.adapter, sequence.num_tokens
    if pipelines and not any(each.facts.has_adapter(adapter) for each in pipelines):
        return ModelNotFound(f"no adapter {adapter} here")
    if not 0 < max_capacity <= num_tokens:
        return None
    has_run = sequence.admitted_ns is not None or sequence.num_output_tokens > 0
    error = MeshUnavailable if has_run else ContextLengthExceeded
    return error(too_long(num_tokens, max_capacity))


def too_long(num_tokens: int, max_capacity: int) -> str:
    return f"{num_tokens} tokens leave no room for output in {max_capacity}, the longest"
