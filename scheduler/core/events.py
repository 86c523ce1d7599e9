"""What the core tells of requests: tokens as they come, and one ending."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from scheduler.core.request import RequestKey
from stagemesh.errors import StageMeshError
from stagemesh.plan import SampledToken
from stagemesh.values import value


class EndReason(Enum):
    STOP_TOKEN = "stop_token"
    LENGTH = "length"
    ABORTED = "aborted"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Admission:
    """Of a request that runs: how much of its prompt was cached, and how long it waited."""

    cached_prompt_tokens: int
    queue_ns: int


@value
class Tokens:
    """`tokens` stand at [index, index + len(tokens)) of the output.

    `prompt_logprobs` comes with the first tokens of a request that asked for it: one entry per
    prompt token but the first. `admission` comes with the first tokens of an attempt.
    """

    key: RequestKey
    attempt: int
    index: int
    tokens: tuple[SampledToken, ...]
    prompt_logprobs: tuple[SampledToken, ...] = ()
    admission: Admission | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of an accepted request; there is always exactly one.

    `error` is given where `reason` is ERROR. `completion_tokens` counts the output of earlier
    attempts too. `queue_ns` is the time until the request first ran, or until it ended.
    """

    key: RequestKey
    attempt: int
    reason: EndReason
    error: StageMeshError | None
    completion_tokens: int
    cached_prompt_tokens: int
    queue_ns: int
