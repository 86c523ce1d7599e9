"""Percentiles, objectives and rates over spans of time, of samples whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.bench.samples import Sample
from stagemesh.bench.summary import (
    Objective,
    Spread,
    decode_rate,
    full_rate,
    full_span_s,
    percentile,
)
from stagemesh.bench.workload import Ask


def sample(
    *times_s: float, due_s: float = 0.0, ended_s: float | None = None, error: str | None = None
) -> Sample:
    """One token at each of the times."""
    return Sample(
        Ask(8, len(times_s), seed=0),
        due_s=due_s,
        sent_s=due_s,
        ended_s=(times_s[-1] if times_s else due_s) if ended_s is None else ended_s,
        deliveries=[(time_s, 1) for time_s in times_s],
        output_tokens=len(times_s),
        error=error,
    )


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50),
    st.floats(0, 100),
)
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    expected = np.percentile(values, percent)
    assert percentile(sorted(values), percent) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_a_spread() -> None:
    spread = Spread.of([float(n) for n in range(101)])
    assert spread == Spread(num=101, mean=50.0, p50=50.0, p90=90.0, p99=99.0, max=100.0)
    assert Spread.of([]) is None


def test_latencies_count_from_when_a_request_was_due() -> None:
    late = Sample(Ask(8, 3, 0), due_s=1.0, sent_s=5.0, ended_s=9.0)
    late.deliveries = [(6.0, 1), (7.0, 1), (9.0, 1)]
    late.output_tokens = 3
    assert (late.ttft_s, late.e2e_s, late.tpot_s) == (5.0, 8.0, 1.5)
    assert late.itls_s == [1.0, 2.0]


def test_a_message_of_several_tokens_is_one_gap_and_several_tokens() -> None:
    several = Sample(Ask(8, 5, 0), due_s=0.0, ended_s=4.0)
    several.deliveries = [(1.0, 1), (3.0, 4)]
    several.output_tokens = 5
    assert several.itls_s == [2.0]
    assert several.tpot_s == 0.5


def test_messages_of_unknown_size_share_the_servers_count() -> None:
    unknown = sample(1.0, 2.0, 3.0, 4.0)
    unknown.take_usage(prompt_tokens=9, output_tokens=10, cached=2)
    assert math.fsum(num for _, num in unknown.deliveries) == 10
    assert (unknown.output_tokens, unknown.prompt_tokens) == (10, 9)
    # 7.5 tokens after the first message, in three seconds.
    assert unknown.tpot_s == pytest.approx(0.4)


def test_one_token_has_no_time_per_token_and_no_gap() -> None:
    assert sample(1.0).tpot_s is None
    assert sample(1.0).itls_s == []
    assert sample(error="lost").e2e_s is None


def test_an_objective_is_met_in_every_part_or_not() -> None:
    objective = Objective(ttft_s=1.0, tpot_s=0.5)
    assert objective.is_met_by(sample(1.0, 1.5, 2.0))
    assert not objective.is_met_by(sample(1.1, 1.5, 2.0))
    assert not objective.is_met_by(sample(0.5, 1.5))
    assert objective.is_met_by(sample(0.5))
    assert not objective.is_met_by(sample(0.5, error="lost"))
    assert not Objective().is_stated
    assert not Objective(e2e_s=3.0).is_met_by(sample(1.0, 4.0))


def test_a_loops_full_time_is_without_its_beginning_and_end() -> None:
    samples = [
        sample(1.0, 2.0, 3.0, 4.0, due_s=0.0),
        sample(2.0, 3.0, due_s=1.5),
        sample(5.0, 6.0, 9.0, due_s=4.0),
    ]
    assert full_span_s(samples, 2) == (1.5, 4.0)
    # In (1.5, 4]: 2, 3, 4 of the first, 2, 3 of the second.
    assert full_rate(samples, 2) == pytest.approx(5 / 2.5)
    assert full_span_s(samples, 3) is None
    assert full_rate(samples, 3) is None


def test_a_batch_decodes_between_its_last_first_and_its_first_last_token() -> None:
    samples = [sample(1.0, 2.0, 3.0, 4.0), sample(2.0, 3.0, 4.0, 5.0)]
    assert decode_rate(samples) == pytest.approx(4 / 2.0)
    assert decode_rate([sample(1.0)]) is None
    assert decode_rate([sample(1.0, 2.0), sample(2.0, 3.0)]) is None
    assert decode_rate([]) is None
