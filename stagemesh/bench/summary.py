"""From many numbers to few: percentiles, rates over spans of time, and what met an objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stagemesh.bench.samples import Sample


@dataclass(frozen=True, slots=True)
class Spread:
    """Of `num` values; all in the unit of the values."""

    num: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of no values."""
        if not values:
            return None
        ordered = sorted(values)
        return cls(
            num=len(ordered),
            mean=math.fsum(ordered) / len(ordered),
            p50=percentile(ordered, 50),
            p90=percentile(ordered, 90),
            p99=percentile(ordered, 99),
            max=ordered[-1],
        )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of `ordered`, which must be sorted and not empty."""
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, slots=True)
class Objective:
    """What a user is content with; None where that does not matter."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @property
    def is_stated(self) -> bool:
        return any(limit is not None for limit in (self.ttft_s, self.tpot_s, self.e2e_s))

    def is_met_by(self, sample: Sample) -> bool:
        """A failed request meets none; one of a single token has no time per token to be late."""
        if not sample.is_whole or sample.ttft_s is None:
            return False
        pairs = (
            (sample.ttft_s, self.ttft_s),
            (sample.tpot_s, self.tpot_s),
            (sample.e2e_s, self.e2e_s),
        )
        return all(value is None or limit is None or value <= limit for value, limit in pairs)


def tokens_between(samples: Sequence[Sample], start_s: float, end_s: float) -> float:
    """Output tokens that came in (start, end]."""
    return math.fsum(
        num for sample in samples for time_s, num in sample.deliveries if start_s < time_s <= end_s
    )


def full_span_s(samples: Sequence[Sample], concurrency: int) -> tuple[float, float] | None:
    """From when `concurrency` requests were first under way until they last were.

    Between the two a closed loop has that many, but for the moments in which it sends the next.
    """
    # At one time what is sent comes before what ends.
    changes = sorted(
        [(sample.sent_s, 0) for sample in samples] + [(sample.ended_s, 1) for sample in samples]
    )
    under_way, first_s, last_s = 0, None, None
    for time_s, ends in changes:
        if ends:
            last_s = time_s if under_way >= concurrency else last_s
            under_way -= 1
        else:
            under_way += 1
            first_s = time_s if first_s is None and under_way >= concurrency else first_s
    return None if first_s is None or last_s is None else (first_s, last_s)


def full_rate(samples: Sequence[Sample], concurrency: int) -> float | None:
    """Output tokens a second in that time: without the load's own beginning and end."""
    span = full_span_s(samples, concurrency)
    if span is None or span[1] <= span[0]:
        return None
    return tokens_between(samples, *span) / (span[1] - span[0])


def decode_span_s(samples: Sequence[Sample]) -> tuple[float, float] | None:
    """When all requests of a batch had their first token and none its last.

    None where that was never so, or where one has but one message.
    """
    if not samples or not all(len(sample.deliveries) > 1 for sample in samples):
        return None
    start_s = max(sample.deliveries[0][0] for sample in samples)
    end_s = min(sample.deliveries[-1][0] for sample in samples)
    return (start_s, end_s) if end_s > start_s else None


def decode_rate(samples: Sequence[Sample]) -> float | None:
    """Output tokens a second in that time."""
    span = decode_span_s(samples)
    return None if span is None else tokens_between(samples, *span) / (span[1] - span[0])
