"""Spans of stages: as even as can be, beside the spans that operators fixed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.placement import StageCosts, check_span, partition, plan_stages
from stagemesh.errors import SpanError
from stagemesh.plan import Span

EQUAL = StageCosts(num_layers=6, layer_bytes=10, embedding_bytes=0, head_bytes=0)


def spans(*borders: int) -> tuple[Span, ...]:
    return tuple(Span(start, end) for start, end in itertools.pairwise(borders))


def all_cuts(num_layers: int, num_stages: int) -> list[tuple[Span, ...]]:
    inner = itertools.combinations(range(1, num_layers), num_stages - 1)
    return [spans(0, *borders, num_layers) for borders in inner]


def weight(costs: StageCosts, cut: tuple[Span, ...]) -> tuple[int, int, int]:
    read = [costs.read_bytes(span) for span in cut]
    memory = [costs.memory_bytes(span) for span in cut]
    return max(read), max(memory), sum(cost**2 for cost in read)


@given(
    num_layers=st.integers(1, 9),
    num_stages=st.integers(1, 9),
    layer_bytes=st.integers(0, 20),
    embedding_bytes=st.integers(0, 60),
    head_bytes=st.integers(0, 60),
)
def test_a_partition_is_the_best_of_all_cuts(
    num_layers: int, num_stages: int, layer_bytes: int, embedding_bytes: int, head_bytes: int
) -> None:
    costs = StageCosts(num_layers, layer_bytes, embedding_bytes, head_bytes)
    if num_stages > num_layers:
        with pytest.raises(SpanError, match="too many"):
            partition(costs, num_stages)
        return
    best = min(weight(costs, cut) for cut in all_cuts(num_layers, num_stages))
    assert weight(costs, partition(costs, num_stages)) == best


@given(data=st.data())
def test_a_partition_beside_fixed_spans_is_the_best_that_keeps_them(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(2, 8))
    costs = StageCosts(num_layers, 10, data.draw(st.integers(0, 30)), data.draw(st.integers(0, 30)))
    whole = data.draw(st.sampled_from(all_cuts(num_layers, data.draw(st.integers(1, num_layers)))))
    fixed = [span for span in whole if data.draw(st.booleans())]
    num_stages = data.draw(st.integers(1, num_layers))
    cuts = [cut for cut in all_cuts(num_layers, num_stages) if set(fixed) <= set(cut)]
    if not cuts:
        with pytest.raises(SpanError):
            partition(costs, num_stages, fixed)
        return
    best = min(weight(costs, cut) for cut in cuts)
    assert weight(costs, partition(costs, num_stages, fixed)) == best


@given(data=st.data())
def test_a_plan_covers_the_model_with_workers_that_are_there(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(1, 8))
    costs = StageCosts(num_layers, 10, 5, 5)
    every = [Span(a, b) for a in range(num_layers) for b in range(a + 1, num_layers + 1)]
    fixed = data.draw(st.lists(st.sampled_from(every), max_size=5))
    num_free = data.draw(st.integers(0, 5))
    num_stages = data.draw(st.integers(0, num_layers))
    plan = plan_stages(costs, fixed, num_free, num_stages)
    if plan is None:
        return
    assert plan == spans(0, *(span.end for span in plan))
    assert plan[-1].end == num_layers
    assert len([span for span in plan if span not in fixed]) <= num_free


def test_the_head_counts_as_work_and_the_embedding_does_not() -> None:
    heavy_head = StageCosts(num_layers=6, layer_bytes=10, embedding_bytes=0, head_bytes=20)
    assert partition(heavy_head, 2) == spans(0, 4, 6)
    heavy_embedding = StageCosts(num_layers=6, layer_bytes=10, embedding_bytes=20, head_bytes=0)
    assert partition(heavy_embedding, 2) == spans(0, 3, 6)


def test_the_embedding_decides_where_costs_tie() -> None:
    costs = StageCosts(num_layers=5, layer_bytes=10, embedding_bytes=5, head_bytes=0)
    assert partition(costs, 2) == spans(0, 2, 5)


def test_free_workers_fill_the_gaps_between_fixed_spans() -> None:
    assert plan_stages(EQUAL, [Span(0, 2)], 2, 0) == spans(0, 2, 4, 6)
    assert plan_stages(EQUAL, [Span(0, 2)], 2, 2) == spans(0, 2, 6)
    assert plan_stages(EQUAL, [Span(2, 4)], 1, 0) is None
    assert plan_stages(EQUAL, [Span(2, 4)], 2, 0) == spans(0, 2, 4, 6)


def test_fixed_spans_that_cover_everything_need_nobody_else() -> None:
    assert plan_stages(EQUAL, [Span(0, 2), Span(2, 6)], 3, 0) == spans(0, 2, 6)
    assert plan_stages(EQUAL, [Span(0, 2), Span(2, 6)], 3, 4) == spans(0, 2, 6)


def test_of_overlapping_fixed_spans_those_that_fit_are_taken() -> None:
    fixed = [Span(0, 3), Span(0, 2), Span(2, 6), Span(1, 5)]
    assert plan_stages(EQUAL, fixed, 0, 0) == spans(0, 2, 6)


def test_too_few_workers_make_no_plan() -> None:
    assert plan_stages(EQUAL, [], 1, 2) is None
    assert plan_stages(EQUAL, [], 0, 0) is None
    assert plan_stages(EQUAL, [Span(0, 3), Span(0, 3)], 0, 2) is None


def test_more_workers_than_layers_make_one_stage_per_layer() -> None:
    assert plan_stages(EQUAL, [], 9, 0) == spans(*range(7))


@pytest.mark.parametrize("span", [Span(0, 7), Span(3, 3), Span(4, 2), Span(6, 7)])
def test_a_span_outside_the_model_is_refused_by_name(span: Span) -> None:
    with pytest.raises(SpanError, match=f"{span.start}:{span.end}.*0:6"):
        check_span(span, 6)
