"""A gateway process: holds requests, submits them again after a loss, and objects to what is wrong.

Does what gateway/mesh_client.py does. A client's stream has one right answer, known beforehand:
exactly that must come, in order, once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from simulation.arrivals import Arrival
from simulation.clock import MS, S
from simulation.mesh_messages import Abort, Submit, Welcome
from simulation.oracle import Violation
from simulation.pretend_model import RightAnswer
from simulation.process import End, Process

from scheduler.core import EndReason, Finished, Request, RequestKey, Tokens
from stagemesh.errors import MeshUnavailable, QueueFull, RequestDeadlineExceeded

if TYPE_CHECKING:
    from simulation.mesh_world import MeshWorld

_HEARTBEAT_NS = S // 2
_SILENCE_NS = 2 * S


@dataclass(slots=True, eq=False)
class Held:
    """One request; `num_raw` counts tokens of the present attempt, brought ones included."""

    request: Request
    right: RightAnswer
    attempt: int = 0
    num_raw: int = 0
    output: list[int] = field(default_factory=list)
    has_ended: bool = False

    @property
    def is_stopped(self) -> bool:
        return bool(self.output) and self.output[-1] in self.request.sampling.stop_token_ids

    @property
    def is_complete(self) -> bool:
        return self.is_stopped or len(self.output) >= self.request.max_tokens


class FakeGateway(Process):
    def __init__(self, world: MeshWorld, name: str, incarnation: int) -> None:
        super().__init__(world.clock, name, f"{world.seed} {incarnation}")
        self.held: dict[int, Held] = {}
        self.num_refused = 0
        self._world = world
        self.incarnation = incarnation
        self._term = 0
        self._end: End | None = None
        self._is_attached = False
        self._heard_ns = 0

    # ---- the stream ----------------------------------------------------------------------------

    def start(self) -> None:
        self._dial()
        self.after(_HEARTBEAT_NS, self._beat)

    def control_breaks(self) -> None:
        if self._end is not None:
            self._end.cut()

    def _dial(self) -> None:
        scheduler = self._world.scheduler
        end = self._end = self.dial(scheduler, scheduler.accept_gateway)
        end.on_message = lambda message: self._take(end, message)
        end.on_closed = lambda: self._detached(end)
        end.send(self.incarnation)

    def _detached(self, end: End) -> None:
        if self._end is end:
            self._end, self._is_attached = None, False
            self.after(self.random.randint(50 * MS, 500 * MS), self._dial)

    def _beat(self) -> None:
        end = self._end
        if end is not None and self._is_attached:
            end.send(None)
            if self.clock.now_ns >= self._heard_ns + _SILENCE_NS:
                end.close()
                self._detached(end)
        self.after(_HEARTBEAT_NS, self._beat)

    def _take(self, end: End, message: object) -> None:
        if end is not self._end:
            return
        self._heard_ns = self.clock.now_ns
        if isinstance(message, Welcome):
            self._attached(end, message.term)
        elif isinstance(message, Tokens):
            self._take_tokens(message)
        elif isinstance(message, Finished):
            self._take_end(message)

    def _attached(self, end: End, term: int) -> None:
        if term < self._term:
            end.close()
            self._detached(end)
            return
        self._term, self._is_attached = term, True
        for held in self.held.values():
            self._submit(held)

    # ---- requests ------------------------------------------------------------------------------

    def open(self, arrival: Arrival) -> None:
        """A client comes."""
        number = arrival.request.key.request
        request = replace(arrival.request, key=RequestKey(self.incarnation, number))
        right = RightAnswer(
            request.prompt_token_ids,
            request.sampling,
            request.total_length,
            self._world.scenario.dynamic_rope,
            request.adapter,
        )
        held = self.held[number] = Held(request, right)
        if arrival.abort_after_ns is not None:
            self.after(arrival.abort_after_ns, lambda: self._give_up(held))
        if request.deadline_ns is not None:
            self.after(request.deadline_ns - self.clock.now_ns, lambda: self._give_up(held))
        self._submit(held)

    def _submit(self, held: Held) -> None:
        """The first time, or again after the stream broke."""
        if held.has_ended or self._end is None or not self._is_attached:
            return
        if held.is_complete:
            held.has_ended = True  # only the mesh's word for it was lost
            return
        held.attempt += 1
        held.num_raw = len(held.output)
        sampling = held.request.sampling
        if held.output:
            sampling = replace(sampling, num_prompt_logprobs=None)
        output = tuple(held.output)
        request = replace(
            held.request, attempt=held.attempt, output_token_ids=output, sampling=sampling
        )
        self._end.send(Submit(request))

    def _give_up(self, held: Held) -> None:
        """The client went, or its time is over."""
        if not held.has_ended:
            held.has_ended = True
            if self._end is not None and self._is_attached:
                self._end.send(Abort(held.request.key, held.attempt))

    def _current(self, key: RequestKey, attempt: int) -> Held | None:
        held = self.held.get(key.request)
        return held if held is not None and held.attempt == attempt else None

    def _take_tokens(self, event: Tokens) -> None:
        held = self._current(event.key, event.attempt)
        if held is None:
            return
        name = held.request.label
        if event.index != held.num_raw:
            raise Violation(f"{name}: tokens from {event.index} on where {held.num_raw} is next")
        held.num_raw += len(event.tokens)
        if held.has_ended:
            return
        is_first = event.index == len(held.request.output_token_ids) == 0
        wants = held.request.sampling.num_prompt_logprobs is not None and is_first
        if event.prompt_logprobs != (held.right.prompt_logprobs() if wants else ()):
            raise Violation(f"{name}: wrong log-probabilities of the prompt")
        held.output += [token.token_id for token in event.tokens]
        right = held.right.output(len(held.output))
        if tuple(held.output) != right:
            raise Violation(f"{name}: output {held.output}, right is {list(right)}")

    def _take_end(self, event: Finished) -> None:
        held = self._current(event.key, event.attempt)
        if held is None or held.has_ended:
            return
        if isinstance(event.error, QueueFull) and held.attempt > 1:
            # It was accepted once: it waits rather than fails.
            self.after(S // 4, lambda: self._submit(held))
            return
        if not self._may_end(held, event):
            raise Violation(f"{held.request.label} has no reason to end: {event}")
        held.has_ended = True

    def _may_end(self, held: Held, event: Finished) -> bool:
        if event.reason in (EndReason.STOP_TOKEN, EndReason.LENGTH):
            return held.is_complete and (event.reason is EndReason.STOP_TOKEN) == held.is_stopped
        deadline_ns = held.request.deadline_ns
        if isinstance(event.error, RequestDeadlineExceeded | MeshUnavailable):
            return deadline_ns is not None and deadline_ns <= self.clock.now_ns
        if isinstance(event.error, QueueFull):
            self.num_refused += 1
            return deadline_ns is not None  # which the scheduler found impossible to meet
        return False
