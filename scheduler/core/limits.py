"""How much the scheduler may take on at once, as the operator set it."""

from __future__ import annotations

from dataclasses import dataclass

from stagemesh.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Limits of the queue, of each pipeline and of each step.

    `max_running_requests` holds per pipeline. `max_step_tokens` bounds the tokens of one step, so
    it bounds the latency that a long prompt adds to its neighbours; `max_chunk_tokens` bounds the
    part of one sequence in it (None: the step's bound alone). `max_steps_in_flight` None: as many
    as the pipeline has stages.

    Raises ConfigError, naming the option.
    """

    max_waiting_requests: int = 1024
    max_running_requests: int = 256
    max_step_tokens: int = 512
    max_chunk_tokens: int | None = None
    prefix_cache: bool = True
    max_steps_in_flight: int | None = None

    def __post_init__(self) -> None:
        _check_positive("max_waiting_requests", self.max_waiting_requests)
        _check_positive("max_running_requests", self.max_running_requests)
        _check_positive("max_step_tokens", self.max_step_tokens)
        _check_positive("max_chunk_tokens", self.max_chunk_tokens)
        _check_positive("max_steps_in_flight", self.max_steps_in_flight)


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"{name} must be at least 1, not {value}")
