"""Whether steps come back: which are overdue, and which pipelines were idle for too long to tell.

A step's time is measured from when it was the oldest under way, and judged by what steps of its
size took before: a large chunk of a prompt may take long and is no failure. Sans-IO.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from stagemesh.plan import Epoch, Step

# How much longer than usual is too long.
_PATIENCE = 10
# Nothing is known of the first steps of an epoch: devices warm up, stages are rebuilt. Beside this,
# each token has the time that reading all weights takes at a speed below any device's.
_FIRST_LIMIT_NS = 60_000_000_000
_SLOWEST_BYTES_PER_NS = 2
_FORGETTING = 0.05


class Overdue(NamedTuple):
    pipeline_id: str
    epoch: Epoch
    step: int
    limit_ns: int


class UsualTimes:
    """What steps took, by the magnitude of their tokens. High values are remembered for long."""

    def __init__(self) -> None:
        self._by_size: dict[int, float] = {}

    def learn(self, num_tokens: int, duration_ns: int) -> None:
        size = num_tokens.bit_length()
        known = self._by_size.get(size, 0.0)
        self._by_size[size] = max(duration_ns, known + _FORGETTING * (duration_ns - known))

    def predict_ns(self, num_tokens: int) -> float:
        """Where nothing of this size is known: twice as long for twice the tokens of a smaller
        one, or as long as a larger one; 0 where nothing is known at all."""
        size, known = num_tokens.bit_length(), self._by_size
        if size in known:
            return known[size]
        smaller = [known[each] * 2.0 ** (size - each) for each in known if each < size]
        larger = [known[each] for each in known if each > size]
        return max(smaller, default=min(larger, default=0.0))


@dataclass(slots=True)
class _Watched:
    epoch: Epoch
    usual: UsualTimes
    # When something happened last: the epoch began, a step was sent to an idle pipeline, one came
    # back. The oldest step's time counts from there.
    since_ns: int
    weight_bytes: int
    is_proven: bool = False
    # (number, tokens)
    in_flight: deque[tuple[int, int]] = field(default_factory=deque)


class StepWatch:
    """`canary_interval_ns` 0: idle pipelines are left alone."""

    def __init__(self, lease_ns: int, canary_interval_ns: int) -> None:
        self._lease_ns = lease_ns
        self._canary_interval_ns = canary_interval_ns
        self._watched: dict[str, _Watched] = {}
        self._usual: dict[str, UsualTimes] = {}

    def epoch_began(
        self, pipeline_id: str, epoch: Epoch, now_ns: int, weight_bytes: int = 0
    ) -> None:
        """`weight_bytes` are the model's."""
        usual = self._usual.setdefault(pipeline_id, UsualTimes())
        self._watched[pipeline_id] = _Watched(epoch, usual, now_ns, weight_bytes)

    def epoch_ended(self, pipeline_id: str) -> None:
        self._watched.pop(pipeline_id, None)

    def pipeline_removed(self, pipeline_id: str) -> None:
        self.epoch_ended(pipeline_id)
        self._usual.pop(pipeline_id, None)

    def step_sent(self, step: Step, now_ns: int) -> None:
        watched = self._watched.get(step.pipeline_id)
        if watched is None or watched.epoch != step.epoch:
            return
        if not watched.in_flight:
            watched.since_ns = now_ns
        watched.in_flight.append((step.step, step.num_tokens))

    def step_done(self, pipeline_id: str, epoch: Epoch, step: int, now_ns: int) -> bool:
        """Whether that was the answer to the oldest step; else it says nothing."""
        watched = self._watched.get(pipeline_id)
        if watched is None or watched.epoch != epoch or not watched.in_flight:
            return False
        number, num_tokens = watched.in_flight[0]
        if number != step:
            return False
        watched.in_flight.popleft()
        watched.usual.learn(num_tokens, now_ns - watched.since_ns)
        watched.since_ns, watched.is_proven = now_ns, True
        return True

    def overdue(self, now_ns: int) -> list[Overdue]:
        return [
            Overdue(pipeline_id, watched.epoch, watched.in_flight[0][0], self._limit_ns(watched))
            for pipeline_id, watched in self._watched.items()
            if watched.in_flight and now_ns >= watched.since_ns + self._limit_ns(watched)
        ]

    def idle(self, now_ns: int) -> list[str]:
        """Pipelines through which one token is to go, to see whether they still serve."""
        idle = [
            pipeline_id
            for pipeline_id, watched in self._watched.items()
            if not watched.in_flight and self._is_canary_due(watched, now_ns)
        ]
        for pipeline_id in idle:
            self._watched[pipeline_id].since_ns = now_ns
        return idle

    def wakeup_ns(self) -> int | None:
        times = map(self._due_ns, self._watched.values())
        return min((at for at in times if at is not None), default=None)

    def was_deaf(self, duration_ns: int) -> None:
        """Nothing could be heard for so long."""
        for watched in self._watched.values():
            watched.since_ns += duration_ns

    def _limit_ns(self, watched: _Watched) -> int:
        num_tokens = watched.in_flight[0][1]
        limit_ns = max(self._lease_ns, round(_PATIENCE * watched.usual.predict_ns(num_tokens)))
        if watched.is_proven:
            return limit_ns
        slowest_ns = num_tokens * watched.weight_bytes // _SLOWEST_BYTES_PER_NS
        return max(limit_ns, _FIRST_LIMIT_NS + slowest_ns)

    def _is_canary_due(self, watched: _Watched, now_ns: int) -> bool:
        interval_ns = self._canary_interval_ns
        return interval_ns > 0 and now_ns >= watched.since_ns + interval_ns

    def _due_ns(self, watched: _Watched) -> int | None:
        if watched.in_flight:
            return watched.since_ns + self._limit_ns(watched)
        return watched.since_ns + self._canary_interval_ns if self._canary_interval_ns else None
