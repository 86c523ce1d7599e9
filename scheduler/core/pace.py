"""What the steps of one pipeline cost and how long they are under way, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.core.costs import StageCost, StepRates
from scheduler.core.depth import RoundTrip
from stagemesh.plan import HopTiming


class Pace:
    """`max_steps_in_flight` None: as many as the measured round trip asks for."""

    def __init__(self, num_stages: int, max_steps_in_flight: int | None) -> None:
        self.max_steps_in_flight = max_steps_in_flight or num_stages
        self._num_stages = num_stages
        self._is_fixed = max_steps_in_flight is not None
        self._cost = StageCost()
        self._round_trip = RoundTrip()

    @property
    def rates(self) -> StepRates:
        return self._cost.rates

    def decode_cost(self, num_sequences: int, num_tokens: int) -> float:
        """Of one token of each of so many sequences, which have so many tokens together."""
        return self.rates.token * num_sequences + self.rates.position * num_tokens

    def step_done(
        self,
        num_tokens: int,
        num_positions: float,
        timings: Sequence[HopTiming],
        duration_ns: int,
    ) -> None:
        """A step is back whose rows all went through all stages."""
        compute_ns = max((timing.compute_ns for timing in timings), default=0)
        if compute_ns > 0:
            self._cost.observe(num_tokens, num_positions, compute_ns)
            self._round_trip.observe(timings, duration_ns)

    def tune(self, num_sequences: int, num_tokens: int) -> None:
        """Sets how many steps are to be under way while so many sequences run."""
        if not self._is_fixed:
            work = self.decode_cost(num_sequences, num_tokens)
            self.max_steps_in_flight = self._round_trip.best_depth(
                self._num_stages, self.rates, work
            )
