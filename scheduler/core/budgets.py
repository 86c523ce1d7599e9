"""What a step, and what a pipeline's pool, still have room for. The planning loops ask these."""

from __future__ import annotations

from scheduler.core.costs import StepRates
from scheduler.core.pipeline import Pipeline
from scheduler.core.sequence import Sequence

_OVERDRAFT = 0.95  # of one token's cost


class TokenBudget:
    """The tokens of one step. Catching up is left a share that decoding cannot take."""

    def __init__(self, max_tokens: int, max_chunk_tokens: int | None) -> None:
        self.remaining = max_tokens
        self.reserved = 0
        self._max_chunk_tokens = max_chunk_tokens or max_tokens

    def reserve(self, num_tokens: int) -> None:
        """Keeps so many tokens back from now on."""
        self.reserved = num_tokens

    def grant(self, num_wanted: int) -> int:
        """How many of these tokens one sequence may have, 0 if the step is full."""
        return max(0, min(num_wanted, self.remaining - self.reserved, self._max_chunk_tokens))

    def take(self, num_tokens: int) -> None:
        self.remaining -= num_tokens

    def give_back(self, num_tokens: int) -> None:
        self.remaining += num_tokens


class CostBudget:
    """A share of a step's cost. Whoever comes first may take what `least` buys, and one token."""

    def __init__(self, cost: float, rates: StepRates, least: float = 0.0) -> None:
        self._remaining = cost
        self._least = least
        self._crumb = (1 - _OVERDRAFT) * rates.token
        self._rates = rates
        self._is_untouched = True
        # Whether `grant` would give nothing to a sequence at the beginning of its context.
        self.is_used_up = False

    def grant(self, start: int, num_wanted: int) -> int:
        """How many of the tokens from `start` on may be had. What is left is never too little for
        one more, unless it is next to nothing: else someone would be left over again and again."""
        if self._rates.tokens(start, num_wanted) <= self._remaining:
            return num_wanted
        more = _OVERDRAFT * self._rates.tokens(start, 1)
        num = self._rates.num_tokens_for(self._remaining + more, start)
        if self._is_untouched:
            num = max(1, num, self._rates.num_tokens_for(self._least, start))
        return min(num_wanted, num)

    def take_one(self, position: int) -> None:
        rates = self._rates
        self._remaining -= rates.token + rates.position * (position + 1)
        self._is_untouched = False
        self.is_used_up = self._remaining < self._crumb

    def take(self, start: int, num_tokens: int) -> None:
        self._remaining -= self._rates.tokens(start, num_tokens)
        self._is_untouched = False
        self.is_used_up = self._remaining < self._crumb


class BlockBudget:
    """The blocks of one pipeline that no running sequence will need to catch up.

    Blocks are allocated on demand, so free ones may be spoken for: admitting against the free count
    alone would admit sequences only to preempt them.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        # Who has nothing to plan has its blocks.
        spoken_for = sum(self._num_missing(sequence) for sequence in pipeline.turns.ready.values())
        self.remaining = pipeline.pool.num_free - spoken_for

    def cost(self, sequence: Sequence, hits: list[tuple[int, ...]]) -> int:
        """Free blocks that the sequence takes: new ones, and cached ones that it revives."""
        pool = self._pipeline.pool
        num_shared = sum(pool.num_owners(block_id) > 0 for entry in hits for block_id in entry)
        num_entries = self._pipeline.facts.num_blocks_for(sequence.num_tokens)
        return num_entries * sequence.table.num_groups - num_shared

    def take(self, num_blocks: int) -> None:
        self.remaining -= num_blocks

    def gain(self, sequence: Sequence, kept: set[int]) -> int:
        """Blocks that this running sequence holds alone or is still to be given, but for `kept`."""
        pool = self._pipeline.pool
        held = sequence.table.block_ids()
        num_alone = sum(pool.num_owners(b) == 1 and b not in kept for b in held)
        return num_alone + self._num_missing(sequence)

    def _num_missing(self, sequence: Sequence) -> int:
        facts, table = self._pipeline.facts, sequence.table
        num_missing = facts.num_blocks_for(sequence.num_tokens) - table.num_entries
        return num_missing * table.num_groups if num_missing > 0 else 0
