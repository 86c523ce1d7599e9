"""What travels between the pretend processes of a mesh, beside the scheduler's own commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from simulation.fake_stage import Payload
from simulation.stage_memory import MovedPages

from scheduler.core import Request, RequestKey
from scheduler.membership import Membership
from stagemesh.plan import Epoch, Span, Step

# A worker's message to the scheduler: what is done with it there; (…, session, now_ns).
Word = Callable[[Membership, int, int], None]


@dataclass(frozen=True, slots=True)
class Welcome:
    term: int


@dataclass(frozen=True, slots=True)
class Refused:
    reason: str


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message on a data stream; the answer is None, or the stream breaks."""

    pipeline_id: str
    epoch: Epoch
    to_stage: int
    sender: str


@dataclass(frozen=True, slots=True)
class Frame:
    step: Step
    payload: Payload


@dataclass(frozen=True, slots=True)
class PagesRequest:
    pipeline_id: str
    epoch: Epoch
    span: Span
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PagesSent:
    pages: MovedPages


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    key: RequestKey
    attempt: int
