"""What a step costs the slowest stage, learned from the steps that were done.

    T tokens of a step, P positions that its tokens attend to, summed over the tokens

A step is taken to cost base + token T + position P. The three are fitted by least squares over
recent steps, older ones weighing less and less. Where steps were too much alike to tell the three
apart, they stay near what is usual. Only ratios matter to whoever shares work out; forecasts of
time are the business of scheduler/core/rates.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# A step 100 steps ago weighs a third.
_DECAY = 0.99
_MIN_STEPS = 4
# What is usual: reading the weights takes as long as computing so many tokens.
_USUAL_BASE_TOKENS = 32.0
# How much that counts against what was measured, in steps.
_PRIOR_STEPS = 0.05


@dataclass(frozen=True, slots=True)
class StepRates:
    """In nanoseconds of the slowest stage, or in tokens as long as nothing is known."""

    base: float = _USUAL_BASE_TOKENS
    token: float = 1.0
    position: float = 0.0

    def tokens(self, start: int, num_tokens: int) -> float:
        """What tokens at [start, start + num_tokens) of a sequence add to a step."""
        num_positions = num_tokens * (start + (num_tokens + 1) / 2)
        return self.token * num_tokens + self.position * num_positions

    def num_tokens_for(self, cost: float, start: int) -> int:
        """How many tokens from `start` on cost at most so much."""
        if cost <= 0:
            return 0
        each = self.token + self.position * (start + 0.5)
        if self.position <= 0:
            return int(cost / each)
        half = self.position / 2
        return int((math.sqrt(each * each + 4 * half * cost) - each) / (2 * half))


@dataclass(slots=True)
class StageCost:
    """Of one pipeline. `rates` are the latest."""

    rates: StepRates = StepRates()
    num_steps: int = 0
    # Sums of products of (1, T, P) with each other, and with the cost.
    _products: list[list[float]] = field(default_factory=lambda: [[0.0] * 3 for _ in range(3)])
    _costs: list[float] = field(default_factory=lambda: [0.0] * 3)

    def observe(self, num_tokens: int, num_positions: float, cost_ns: int) -> None:
        """A step took the slowest stage so long."""
        features = (1.0, float(num_tokens), num_positions)
        for i, one in enumerate(features):
            self._costs[i] = self._costs[i] * _DECAY + one * cost_ns
            row = self._products[i]
            for j, other in enumerate(features):
                row[j] = row[j] * _DECAY + one * other
        self.num_steps += 1
        if self.num_steps >= _MIN_STEPS:
            self.rates = self._fit()

    def _fit(self) -> StepRates:
        """A rate that came out negative is taken to be 0, and the others are fitted again."""
        num, sum_tokens = self._products[0][0], self._products[0][1]
        usual_token = self._costs[0] / (_USUAL_BASE_TOKENS * num + sum_tokens)
        if usual_token <= 0:
            return self.rates
        usual = [_USUAL_BASE_TOKENS * usual_token, usual_token, 0.0]
        kept = [0, 1, 2] if self._products[2][2] > 0 else [0, 1]
        while True:
            found = self._solve(kept, usual)
            negative = [i for i in kept if found[i] < 0]
            if not negative:
                break
            kept.remove(negative[-1])
        if found[1] <= 0:  # nothing is free of cost: else a step would take all there is
            found[1] = usual_token
        return StepRates(*found)

    def _solve(self, kept: list[int], usual: list[float]) -> list[float]:
        """The rates of `kept`; that of the others is 0."""
        num = self._products[0][0]
        matrix, right = [], []
        for i in kept:
            stiffness = _PRIOR_STEPS * self._products[i][i] / num
            matrix.append([self._products[i][j] + (stiffness if i == j else 0.0) for j in kept])
            right.append(self._costs[i] + stiffness * usual[i])
        found = [0.0, 0.0, 0.0]
        for i, value in zip(kept, _solved(matrix, right), strict=True):
            found[i] = value
        return found


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """By Cholesky: the matrix is symmetric and positive definite."""
    size = len(right)
    root = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = matrix[i][j] - sum(root[i][k] * root[j][k] for k in range(j))
            if i == j:
                root[i][i] = math.sqrt(max(rest, 1e-12 * matrix[i][i]))
            else:
                root[i][j] = rest / root[j][j]
    middle: list[float] = []
    for i in range(size):
        middle.append((right[i] - sum(root[i][k] * middle[k] for k in range(i))) / root[i][i])
    found = [0.0] * size
    for i in reversed(range(size)):
        rest = middle[i] - sum(root[k][i] * found[k] for k in range(i + 1, size))
        found[i] = rest / root[i][i]
    return found
