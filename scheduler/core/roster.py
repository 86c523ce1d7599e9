"""The requests that live: from their acceptance to their one ending, and what is told of them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from itertools import count

from scheduler.core.counters import Counters
from scheduler.core.deadlines import Deadlines
from scheduler.core.events import Admission, EndReason, Finished, Tokens
from scheduler.core.queue import WaitingQueue
from scheduler.core.request import Request, RequestKey
from scheduler.core.sequence import Sequence
from stagemesh.errors import StageMeshError
from stagemesh.plan import SampledToken

# A submission may come twice, the second time after the request has ended.
_MAX_ENDED_REMEMBERED = 8192


class Roster:
    """A sequence in here waits in `queue` or runs on a pipeline; `end` is the only way out."""

    def __init__(self) -> None:
        self.queue = WaitingQueue()
        self.counters = Counters()
        self.live: dict[RequestKey, Sequence] = {}
        self._ended_attempts: OrderedDict[RequestKey, int] = OrderedDict()
        self._deadlines = Deadlines()
        self._events: list[Tokens | Finished] = []
        self._numbers = count(1)

    def last_attempt(self, key: RequestKey) -> int:
        """The highest attempt that was accepted, -1 for none (or none lately)."""
        sequence = self.live.get(key)
        return sequence.request.attempt if sequence else self._ended_attempts.get(key, -1)

    def number(self, request: Request, now_ns: int) -> Sequence:
        """A sequence for the request, unique within the core; nobody knows of it yet."""
        number = next(self._numbers)
        return Sequence(request, sequence_id=number, arrival=number, submitted_ns=now_ns)

    def accept(self, request: Request, now_ns: int) -> Sequence:
        """The request waits from now on; an older attempt must have ended."""
        assert request.key not in self.live
        sequence = self.number(request, now_ns)
        self.counters.num_accepted += 1
        self.live[request.key] = sequence
        self._deadlines.add(sequence)
        self.queue.add(sequence)
        return sequence

    def admit(self, sequence: Sequence, now_ns: int) -> None:
        """The sequence waits no longer: a pipeline has taken it."""
        self.queue.remove(sequence)
        if sequence.admitted_ns is not None:
            return
        sequence.admitted_ns = now_ns
        num_prompt = sequence.num_prompt_tokens
        sequence.num_cached_prompt_tokens = min(sequence.num_computed, num_prompt)
        self.counters.prompt_admitted(num_prompt, sequence.num_cached_prompt_tokens, now_ns)

    def deliver(self, sequence: Sequence, token: SampledToken) -> None:
        """One more token of output."""
        request = sequence.request
        index = len(sequence.tokens) - sequence.num_prompt_tokens
        sequence.tokens.append(token.token_id)
        event = Tokens(request.key, request.attempt, index, (token,))
        if index == len(request.output_token_ids):  # the first of this attempt
            logprobs = tuple(sequence.prompt_logprobs)
            event = replace(event, prompt_logprobs=logprobs, admission=_admission(sequence))
        self._events.append(event)

    def end(
        self,
        sequence: Sequence,
        reason: EndReason,
        now_ns: int,
        error: StageMeshError | None = None,
    ) -> None:
        """The one way out, for every accepted request. Its blocks are free at once."""
        if sequence.pipeline is None:
            self.queue.remove(sequence)
        else:
            sequence.pipeline.dismiss(sequence)
        sequence.has_ended = True
        del self.live[sequence.key]
        self._remember(sequence)
        self._deadlines.sequence_ended(sequence)
        self.counters.request_ended(reason, now_ns)
        admitted_ns = now_ns if sequence.admitted_ns is None else sequence.admitted_ns
        self._events.append(
            Finished(
                key=sequence.key,
                attempt=sequence.request.attempt,
                reason=reason,
                error=error,
                completion_tokens=sequence.num_output_tokens,
                cached_prompt_tokens=sequence.num_cached_prompt_tokens,
                queue_ns=admitted_ns - sequence.submitted_ns,
            )
        )

    def end_gateway(self, gateway: int, now_ns: int) -> None:
        """A gateway is gone, and its incarnation never comes back."""
        for key in [key for key in self.live if key.gateway == gateway]:
            self.end(self.live[key], EndReason.ABORTED, now_ns)
        for key in [key for key in self._ended_attempts if key.gateway == gateway]:
            del self._ended_attempts[key]

    def expired(self, now_ns: int) -> list[Sequence]:
        return self._deadlines.expired(now_ns)

    def next_deadline_ns(self) -> int | None:
        return self._deadlines.next_ns()

    def take_events(self) -> list[Tokens | Finished]:
        events, self._events = self._events, []
        return events

    def _remember(self, sequence: Sequence) -> None:
        self._ended_attempts[sequence.key] = sequence.request.attempt
        self._ended_attempts.move_to_end(sequence.key)
        if len(self._ended_attempts) > _MAX_ENDED_REMEMBERED:
            self._ended_attempts.popitem(last=False)


def _admission(sequence: Sequence) -> Admission:
    queue_ns = (sequence.admitted_ns or sequence.submitted_ns) - sequence.submitted_ns
    return Admission(sequence.num_cached_prompt_tokens, queue_ns)
