"""How long steps take and how long mending takes, from what was measured; to predict, not to bill.

A step's time is modelled as a fixed part and one per token, fitted by least squares over recent
steps, older ones weighing less and less.
"""

from __future__ import annotations

from dataclasses import dataclass

# A step 100 steps ago weighs a third.
_DECAY = 0.99
_MIN_STEPS = 4
_FIRST_MEND_NS = 3_000_000_000
# How much the latest mending counts against those before.
_MEND_WEIGHT = 0.5


@dataclass(slots=True)
class StepCost:
    """Time between results of a busy pipeline, by the tokens of the step."""

    _last_ns: int | None = None
    _num: float = 0.0
    _sum: float = 0.0
    _sum_squares: float = 0.0
    _sum_ns: float = 0.0
    _sum_products: float = 0.0
    num_steps: int = 0

    def step_done(self, num_tokens: int, sent_ns: int, now_ns: int) -> None:
        """A step that waited for the one before it counts from when that was done."""
        elapsed_ns = now_ns - max(sent_ns, self._last_ns or sent_ns)
        self._last_ns = now_ns
        self.num_steps += 1
        self._num = self._num * _DECAY + 1
        self._sum = self._sum * _DECAY + num_tokens
        self._sum_squares = self._sum_squares * _DECAY + num_tokens**2
        self._sum_ns = self._sum_ns * _DECAY + elapsed_ns
        self._sum_products = self._sum_products * _DECAY + num_tokens * elapsed_ns

    def time_for_ns(self, num_tokens: int, max_step_tokens: int) -> float | None:
        """How long so many tokens take in steps as large as may be; None while little is known."""
        if self.num_steps < _MIN_STEPS:
            return None
        fixed_ns, per_token_ns = self._fit()
        num_steps = max(1.0, num_tokens / max_step_tokens)
        return num_steps * fixed_ns + num_tokens * per_token_ns

    def _fit(self) -> tuple[float, float]:
        """(per step, per token); steps that are all alike say nothing of the fixed part."""
        spread = self._num * self._sum_squares - self._sum**2
        per_token_ns = 0.0
        if spread > 1e-6 * self._sum_squares * self._num:
            per_token_ns = (self._num * self._sum_products - self._sum * self._sum_ns) / spread
        mean_tokens, mean_ns = self._sum / self._num, self._sum_ns / self._num
        if per_token_ns <= 0:
            return 0.0, mean_ns / max(1.0, mean_tokens)
        fixed_ns = mean_ns - per_token_ns * mean_tokens
        return (fixed_ns, per_token_ns) if fixed_ns > 0 else (0.0, mean_ns / max(1.0, mean_tokens))


@dataclass(slots=True)
class Unscheduled:
    """For how long a pipeline served without a step under way: nobody had asked it for anything."""

    _since_ns: int | None = None
    _total_ns: int = 0

    def began(self, now_ns: int) -> None:
        self._since_ns = now_ns if self._since_ns is None else self._since_ns

    def ended(self, now_ns: int) -> None:
        self._total_ns, self._since_ns = self.total_ns(now_ns), None

    def total_ns(self, now_ns: int) -> int:
        """What lasts is counted up to now."""
        return self._total_ns + (0 if self._since_ns is None else now_ns - self._since_ns)


@dataclass(slots=True)
class MendTime:
    """How long a suspended pipeline has to be waited for."""

    _mean_ns: float = _FIRST_MEND_NS
    _num: int = 0

    def mended(self, duration_ns: int) -> None:
        weight = _MEND_WEIGHT if self._num else 1.0
        self._mean_ns += weight * (duration_ns - self._mean_ns)
        self._num += 1

    def remaining_ns(self, elapsed_ns: int) -> float:
        """What is still to be expected: the longer it has taken, the less is known of its end, so
        that in the end as much again is expected as has passed."""
        return max(self._mean_ns - elapsed_ns, float(elapsed_ns))
