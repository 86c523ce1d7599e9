"""How many steps to have under way: as many as stages, or more where messages take long.

More steps mean smaller ones, and each reads the weights again. So one more is only worth its cost
where the stages would otherwise wait for messages for longer than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.core.costs import StepRates
from stagemesh.plan import HopTiming

_FRESHNESS = 0.05
_MIN_STEPS = 16
# By which another step under way must shorten the time between two tokens of a sequence.
_MIN_GAIN = 0.03
_MAX_FACTOR = 2


@dataclass(slots=True)
class RoundTrip:
    """Of steps, in the mean of the latest: `hops_ns` is what no stage accounts for, in all messages
    together; `num_slowest` is how often the slowest stage's time goes into that of all."""

    hops_ns: float = 0.0
    num_slowest: float = 1.0
    num_steps: int = 0

    def observe(self, timings: Sequence[HopTiming], duration_ns: int) -> None:
        """A step came back; `duration_ns` is from its sending on."""
        compute_ns = [timing.compute_ns for timing in timings]
        if not compute_ns or not max(compute_ns):
            return
        waits_ns = sum(timing.queue_ns for timing in timings)
        hops_ns = max(0, duration_ns - waits_ns - sum(compute_ns))
        weight = max(_FRESHNESS, 1 / (self.num_steps + 1))
        self.num_steps += 1
        self.hops_ns += weight * (hops_ns - self.hops_ns)
        self.num_slowest += weight * (sum(compute_ns) / max(compute_ns) - self.num_slowest)

    def token_ns(self, depth: int, rates: StepRates, work: float) -> float:
        """Between two tokens of a sequence, where all sequences together have so much work: until
        the slowest stage has had every step, or until a step is round, whichever is later."""
        step = rates.base + work / depth
        return max(depth * step, self.num_slowest * step + self.hops_ns)

    def best_depth(self, num_stages: int, rates: StepRates, work: float) -> int:
        """For so much decoding, in the cost of its tokens."""
        if self.num_steps < _MIN_STEPS:
            return num_stages
        best, best_ns = num_stages, self.token_ns(num_stages, rates, work)
        for depth in range(num_stages + 1, _MAX_FACTOR * num_stages + 1):
            token_ns = self.token_ns(depth, rates, work)
            if token_ns < (1 - _MIN_GAIN) * best_ns:
                best, best_ns = depth, token_ns
        return best
