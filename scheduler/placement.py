"""Which layers go where: spans of stages, fixed by operators or made even by cost.

Pure functions. A stage's cost is the bytes of weights that it reads for every token: its layers,
and the LM head on the last stage. Looking a token up in the embedding costs next to nothing, but
the embedding takes memory on the first stage; so memory decides where costs tie.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from stagemesh.errors import SpanError
from stagemesh.plan import ModelSummary, Span


@dataclass(frozen=True, slots=True)
class StageCosts:
    """What a span of layers costs, in bytes."""

    num_layers: int
    layer_bytes: int
    embedding_bytes: int
    head_bytes: int

    @classmethod
    def of(cls, model: ModelSummary) -> StageCosts:
        return cls(model.num_layers, model.layer_bytes, model.embedding_bytes, model.head_bytes)

    def read_bytes(self, span: Span) -> int:
        """Read for every token."""
        head_bytes = self.head_bytes if span.end == self.num_layers else 0
        return span.num_layers * self.layer_bytes + head_bytes

    def memory_bytes(self, span: Span) -> int:
        return self.read_bytes(span) + (self.embedding_bytes if span.start == 0 else 0)


def check_span(span: Span, num_layers: int) -> None:
    """Raises SpanError unless `span` holds layers of the model."""
    if not 0 <= span.start < span.end <= num_layers:
        raise SpanError(
            f"layers {span.start}:{span.end} are not in the model, which has layers 0:{num_layers}"
        )


def check_num_stages(num_stages: int, num_layers: int) -> None:
    """Raises SpanError where a stage would have no layer."""
    if num_stages > num_layers:
        raise SpanError(f"{num_stages} stages are too many for a model of {num_layers} layers")


def plan_stages(
    costs: StageCosts, fixed: Iterable[Span], num_free: int, num_stages: int
) -> tuple[Span, ...] | None:
    """The spans of one pipeline's stages, in order, or None where the workers do not suffice.

    `fixed` are the spans that operators fixed, one per worker; `num_free` workers take any span.
    As many layers as possible are covered by fixed spans, each gap between them by free workers.
    `num_stages` 0: as many stages as there are workers for, and no fixed span that fits is left
    out. Fixed spans that cover all layers make a pipeline whatever `num_stages` says.
    """
    chains = _chains(sorted(set(fixed)), costs.num_layers)
    chains.sort(key=lambda chain: (chain.gap_layers, len(chain.spans) != num_stages))
    for chain in chains if num_stages else chains[:1]:
        if chain.num_gaps == 0:
            return chain.spans
        most = min(num_free, chain.gap_layers)
        num_assigned = num_stages - len(chain.spans) if num_stages else most
        if chain.num_gaps <= num_assigned <= most:
            return partition(costs, len(chain.spans) + num_assigned, chain.spans)
    return None


def partition(costs: StageCosts, num_stages: int, fixed: Sequence[Span] = ()) -> tuple[Span, ...]:
    """Cuts layers [0, num_layers) into `num_stages` spans, those of `fixed` among them.

    The slowest stage is as fast as can be; of such cuts, the fullest stage is as small as can be;
    of those, the costs are as even as can be (least sum of squares). Each is found by dynamic
    programming over (stages, layers) within the bounds found before.

    Raises SpanError where there is no such cut.
    """
    check_num_stages(num_stages, costs.num_layers)
    read, memory = costs.read_bytes, costs.memory_bytes
    spans = _spans_beside(fixed, costs.num_layers)
    try:
        slowest, _ = _lightest_cut(spans, costs.num_layers, num_stages, read, max)
    except LookupError:
        raise SpanError(
            f"{num_stages} stages cannot hold {costs.num_layers} layers beside the fixed spans "
            f"{', '.join(f'{span.start}:{span.end}' for span in fixed)}"
        ) from None
    spans = [span for span in spans if read(span) <= slowest]
    fullest, _ = _lightest_cut(spans, costs.num_layers, num_stages, memory, max)
    spans = [span for span in spans if memory(span) <= fullest]
    return _lightest_cut(
        spans, costs.num_layers, num_stages, lambda span: read(span) ** 2, operator.add
    )[1]


def _spans_beside(fixed: Sequence[Span], num_layers: int) -> list[Span]:
    """Spans that a stage may have: a fixed one, or one that overlaps none of them."""
    spans = (
        Span(start, end) for start in range(num_layers) for end in range(start + 1, num_layers + 1)
    )
    return [
        span
        for span in spans
        if span in fixed
        or all(span.end <= other.start or other.end <= span.start for other in fixed)
    ]


def _lightest_cut(
    allowed: Sequence[Span],
    num_layers: int,
    num_stages: int,
    weigh: Callable[[Span], int],
    combine: Callable[[int, int], int],
) -> tuple[int, tuple[Span, ...]]:
    """(weight, spans) of the lightest cut into allowed spans. Raises LookupError."""
    weighed = [(span, weigh(span)) for span in allowed]
    best: dict[int, tuple[int, tuple[Span, ...]]] = {0: (0, ())}
    for _ in range(num_stages):
        longer: dict[int, tuple[int, tuple[Span, ...]]] = {}
        for span, span_weight in weighed:
            if span.start not in best:
                continue
            weight = combine(best[span.start][0], span_weight)
            if span.end not in longer or weight < longer[span.end][0]:
                longer[span.end] = (weight, (*best[span.start][1], span))
        best = longer
    return best[num_layers]


@dataclass(frozen=True, slots=True)
class _Chain:
    """Fixed spans that do not overlap, in order, with gaps between them."""

    spans: tuple[Span, ...]
    gap_layers: int
    num_gaps: int

    def extended(self, at: int, *spans: Span) -> _Chain:
        """With a gap from the end of the chain to `at`, if there is one, and `spans` after it."""
        gap_layers = at - (self.spans[-1].end if self.spans else 0)
        return _Chain(
            (*self.spans, *spans), self.gap_layers + gap_layers, self.num_gaps + (gap_layers > 0)
        )


def _chains(spans: Sequence[Span], num_layers: int) -> list[_Chain]:
    """For each number of fixed spans, the chain that leaves the fewest layers to other workers.

    `spans` are sorted. Dynamic programming over (end of the last span, number of spans).
    """
    ending: dict[tuple[int, int], _Chain] = {(0, 0): _Chain((), 0, 0)}
    for span in spans:
        for (end, count), chain in list(ending.items()):
            if end <= span.start:
                _keep_better(ending, (span.end, count + 1), chain.extended(span.start, span))
    closed: dict[tuple[int, int], _Chain] = {}
    for (_, count), chain in ending.items():
        _keep_better(closed, (num_layers, count), chain.extended(num_layers))
    return list(closed.values())


def _keep_better(table: dict[tuple[int, int], _Chain], key: tuple[int, int], new: _Chain) -> None:
    old = table.get(key)
    if old is None or (new.gap_layers, new.num_gaps) < (old.gap_layers, old.num_gaps):
        table[key] = new
