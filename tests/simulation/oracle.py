"""Knows what every client must see, and objects to anything else."""

from __future__ import annotations

from dataclasses import dataclass, field

from simulation.arrivals import Arrival
from simulation.pretend_model import RightAnswer

from scheduler.core import EndReason, Finished, Request, RequestKey, Tokens
from stagemesh.errors import (
    ContextLengthExceeded,
    MeshUnavailable,
    NotFiniteError,
    PeerLost,
    RequestDeadlineExceeded,
)


class Violation(AssertionError):
    """The core did what it must never do."""


@dataclass(slots=True)
class Stream:
    """One accepted attempt of a request as its client sees it."""

    request: Request
    right: RightAnswer
    poison: int | None
    output: list[int] = field(default_factory=list)
    may_be_aborted: bool = False

    @property
    def name(self) -> str:
        return f"{self.request.label}.{self.request.attempt}"

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.output)


class Oracle:
    def __init__(self, dynamic_rope: int) -> None:
        self._dynamic_rope = dynamic_rope
        self._arrivals: dict[RequestKey, Arrival] = {}
        self._attempts: dict[RequestKey, int] = {}
        self._right: dict[RequestKey, RightAnswer] = {}
        self._outputs: dict[RequestKey, list[int]] = {}
        self.live: dict[tuple[RequestKey, int], Stream] = {}
        # Lengths at which a context may have ended, and what there is now.
        self.capacities_ever: set[int] = set()
        self.max_capacity = 0
        self.is_serving = False  # any pipeline
        self.may_fail = False  # while a step is given up with all its requests

    def arrived(self, arrival: Arrival) -> None:
        request = arrival.request
        self._arrivals[request.key] = arrival
        self._outputs[request.key] = []
        self._right[request.key] = RightAnswer(
            request.prompt_token_ids,
            request.sampling,
            request.total_length,
            self._dynamic_rope,
            request.adapter,
        )

    def delivered(self, key: RequestKey) -> tuple[int, ...]:
        """The longest output that any attempt of the request has delivered."""
        return tuple(self._outputs[key])

    def is_new(self, request: Request) -> bool:
        return request.attempt > self._attempts.get(request.key, -1)

    def last_attempt(self, key: RequestKey) -> int:
        return self._attempts.get(key, -1)

    def accepted(self, request: Request) -> None:
        older = self.live.get((request.key, self.last_attempt(request.key)))
        if older is not None:
            older.may_be_aborted = True
        self._attempts[request.key] = request.attempt
        poison = self._arrivals[request.key].poison
        stream = Stream(request, self._right[request.key], poison, list(request.output_token_ids))
        self.live[request.key, request.attempt] = stream

    def aborted(self, key: RequestKey, attempt: int | None) -> None:
        for (live_key, live_attempt), stream in self.live.items():
            if live_key == key and (attempt is None or attempt >= live_attempt):
                stream.may_be_aborted = True

    def gateway_died(self, gateway: int) -> None:
        for (key, _), stream in self.live.items():
            stream.may_be_aborted |= key.gateway == gateway

    def take(self, event: Tokens | Finished, now_ns: int) -> None:
        stream = self.live.get((event.key, event.attempt))
        if stream is None:
            raise Violation(f"an event for a request that is not live: {event}")
        if isinstance(event, Tokens):
            self._take_tokens(stream, event)
        else:
            self._take_end(stream, event, now_ns)

    def check_ended(self, now_ns: int) -> None:
        """After the core has had its turn: nobody lives who should not."""
        for stream in self.live.values():
            deadline_ns = stream.request.deadline_ns
            if deadline_ns is not None and deadline_ns <= now_ns:
                raise Violation(f"{stream.name} lives after its deadline")
            if stream.may_be_aborted:
                raise Violation(f"{stream.name} lives after its abort")
            if stream.output and stream.output[-1] in stream.request.sampling.stop_token_ids:
                raise Violation(f"{stream.name} lives after its stop token")
            if len(stream.output) >= stream.request.max_tokens:
                raise Violation(f"{stream.name} lives after max_tokens")

    def _take_tokens(self, stream: Stream, event: Tokens) -> None:
        name, request = stream.name, stream.request
        if stream.output and stream.output[-1] in request.sampling.stop_token_ids:
            raise Violation(f"{name}: tokens after a stop token")
        if event.index != len(stream.output) or not event.tokens:
            raise Violation(f"{name}: index {event.index} where {len(stream.output)} is next")
        is_first = event.index == len(request.output_token_ids)
        for token in event.tokens:
            if token.position != stream.num_tokens:
                raise Violation(f"{name}: token at position {token.position}")
            stream.output.append(token.token_id)
        if tuple(stream.output) != stream.right.output(len(stream.output)):
            right = stream.right.output(len(stream.output))
            raise Violation(f"{name}: output {stream.output}, right is {list(right)}")
        if stream.poison is not None and stream.num_tokens - 1 > stream.poison:
            raise Violation(f"{name}: a token after its numbers broke")
        wants = request.sampling.num_prompt_logprobs is not None and is_first and event.index == 0
        if event.prompt_logprobs != (stream.right.prompt_logprobs() if wants else ()):
            raise Violation(f"{name}: wrong log-probabilities of the prompt")
        if len(stream.output) > len(self._outputs[event.key]):
            self._outputs[event.key] = list(stream.output)

    def _take_end(self, stream: Stream, event: Finished, now_ns: int) -> None:
        del self.live[event.key, event.attempt]
        if event.completion_tokens != len(stream.output):
            raise Violation(f"{stream.name}: {event.completion_tokens} tokens counted")
        if event.queue_ns < 0 or not 0 <= event.cached_prompt_tokens <= len(
            stream.request.prompt_token_ids
        ):
            raise Violation(f"{stream.name}: impossible numbers in {event}")
        if (event.error is not None) != (event.reason is EndReason.ERROR):
            raise Violation(f"{stream.name}: {event}")
        if not self._may_end(stream, event, now_ns):
            raise Violation(f"{stream.name} has no reason to end: {event}")

    def _may_end(self, stream: Stream, event: Finished, now_ns: int) -> bool:
        request = stream.request
        if event.reason is EndReason.STOP_TOKEN:
            return stream.output[-1] in request.sampling.stop_token_ids
        if event.reason is EndReason.LENGTH:
            is_at_end = stream.num_tokens in self.capacities_ever
            return len(stream.output) == request.max_tokens or is_at_end
        if event.reason is EndReason.ABORTED:
            return stream.may_be_aborted
        is_late = request.deadline_ns is not None and request.deadline_ns <= now_ns
        if isinstance(event.error, RequestDeadlineExceeded):
            return is_late
        if isinstance(event.error, NotFiniteError):
            return stream.poison is not None and stream.num_tokens - 1 <= stream.poison
        if isinstance(event.error, MeshUnavailable) and is_late and not self.is_serving:
            return True
        if isinstance(event.error, ContextLengthExceeded | MeshUnavailable):
            return stream.num_tokens >= self.max_capacity > 0
        return self.may_fail and isinstance(event.error, PeerLost)
