"""Which waiting sequence begins on which pipeline.

Replicas share one queue, and a sequence is bound to a pipeline as late as possible: only as many
begin as the steps that may be sent now can take. The head of the queue is never overtaken on a
pipeline that could serve it, so a long prompt cannot starve behind short ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from scheduler.core.budgets import BlockBudget
from scheduler.core.limits import SchedulerLimits
from scheduler.core.pipeline import Pipeline
from scheduler.core.sequence import Sequence


def has_place(pipeline: Pipeline, best_priority: int, limits: SchedulerLimits) -> bool:
    """Whether a sequence of this priority may begin, as far as steps and numbers go."""
    if pipeline.num_step_slots <= 0:
        return False
    num_running = len(pipeline.running)
    return num_running < limits.max_running_requests or _has_worse(pipeline, best_priority)


def _has_worse(pipeline: Pipeline, priority: int) -> bool:
    worst = pipeline.turns.worst_priority
    return worst is not None and worst > priority


class _Opening:
    """A pipeline that can take more work in this round.

    Work of worse priority does not count: whoever comes first goes before it in the next steps.
    """

    def __init__(self, pipeline: Pipeline, best_priority: int, max_step_tokens: int) -> None:
        self.pipeline = pipeline
        self._best_priority = best_priority
        self.max_pending_tokens = pipeline.num_step_slots * max_step_tokens
        self.measure()

    def measure(self) -> None:
        self.blocks = BlockBudget(self.pipeline)
        self.num_pending_tokens = sum(
            self.pipeline.num_pending(sequence)
            for sequence in self.pipeline.turns.ready.values()
            if sequence.request.priority <= self._best_priority
        )

    @property
    def has_use_for_more(self) -> bool:
        return self.num_pending_tokens < self.max_pending_tokens


@dataclass(frozen=True, slots=True)
class _Offer:
    opening: _Opening
    hits: list[tuple[int, ...]]
    cost_blocks: int

    def cost_tokens(self, sequence: Sequence) -> int:
        """Work until the sequence's next token; a neighbour weighs as much as a block of prompt."""
        pipeline = self.opening.pipeline
        size = pipeline.facts.block_size_tokens
        num_missing = sequence.num_tokens - len(self.hits) * size
        return num_missing + self.opening.num_pending_tokens + len(pipeline.running) * size


class AdmissionRound:
    """One look at all pipelines on behalf of the queue, whose best priority is given."""

    def __init__(
        self,
        pipelines: Iterable[Pipeline],
        best_priority: int,
        limits: SchedulerLimits,
        preempt: Callable[[Sequence], None],
    ) -> None:
        self._limits = limits
        self._preempt = preempt
        pipelines = tuple(pipelines)
        self._max_capacity = max((p.facts.capacity_tokens for p in pipelines), default=0)
        openings = [
            _Opening(pipeline, best_priority, limits.max_step_tokens)
            for pipeline in pipelines
            if has_place(pipeline, best_priority, limits)
        ]
        self._openings = [opening for opening in openings if opening.has_use_for_more]

    @property
    def is_over(self) -> bool:
        return not self._openings

    def admit(self, sequence: Sequence) -> bool:
        """Lets the sequence begin where it costs least, if there is room for it anywhere.

        A sequence of better priority takes the room of running ones, if that is enough.
        """
        offers = [
            self._offer(o, sequence) for o in self._openings if self._is_eligible(o, sequence)
        ]
        possible = [offer for offer in offers if self._has_room(offer)]
        if not possible:
            possible = self._make_room(offers, sequence)
        if not possible:
            for offer in offers:
                self._openings.remove(offer.opening)
            return False
        self._begin(sequence, min(possible, key=lambda offer: offer.cost_tokens(sequence)))
        return True

    def could_admit(self, sequence: Sequence) -> bool:
        """Whether there is room somewhere without taking it from others."""
        return any(
            self._is_eligible(opening, sequence) and self._has_room(self._offer(opening, sequence))
            for opening in self._openings
        )

    def _is_eligible(self, opening: _Opening, sequence: Sequence) -> bool:
        """A pipeline that holds the whole request, or the largest that there is."""
        needed = min(sequence.request.total_length, self._max_capacity)
        capacity = opening.pipeline.facts.capacity_tokens
        if not opening.pipeline.facts.has_adapter(sequence.request.adapter):
            return False
        return capacity >= needed and capacity > sequence.num_tokens

    def _offer(self, opening: _Opening, sequence: Sequence) -> _Offer:
        hits = opening.pipeline.prefix_hits(sequence) if self._limits.prefix_cache else []
        return _Offer(opening, hits, opening.blocks.cost(sequence, hits))

    def _has_room(self, offer: _Offer) -> bool:
        opening = offer.opening
        has_place = len(opening.pipeline.running) < self._limits.max_running_requests
        return has_place and offer.cost_blocks <= opening.blocks.remaining

    def _make_room(self, offers: list[_Offer], sequence: Sequence) -> list[_Offer]:
        for offer in offers:
            victims = self._victims(offer, sequence)
            for victim in victims:
                self._preempt(victim)
            if victims:
                offer.opening.measure()
                again = self._offer(offer.opening, sequence)
                return [again] if self._has_room(again) else []
        return []

    def _victims(self, offer: _Offer, sequence: Sequence) -> list[Sequence]:
        """Running sequences of worse priority, worst first, as many as needed; none if all of them
        are not enough."""
        pipeline = offer.opening.pipeline
        if not _has_worse(pipeline, sequence.request.priority):
            return []
        num_places = self._limits.max_running_requests - len(pipeline.running)
        num_blocks = offer.opening.blocks.remaining
        kept = {block_id for entry in offer.hits for block_id in entry}
        victims: list[Sequence] = []
        for other in sorted(pipeline.running.values(), key=lambda other: other.rank, reverse=True):
            if other.request.priority <= sequence.request.priority:
                break
            victims.append(other)
            num_places += 1
            num_blocks += offer.opening.blocks.gain(other, kept)
            if num_places > 0 and num_blocks >= offer.cost_blocks:
                return victims
        return []

    def _begin(self, sequence: Sequence, offer: _Offer) -> None:
        opening = offer.opening
        opening.pipeline.admit(sequence, offer.hits)
        opening.blocks.take(offer.cost_blocks)
        opening.num_pending_tokens += sequence.num_pending
        if not opening.has_use_for_more:
            self._openings.remove(opening)
