"""What the last stage answers to a step: tokens, log-probabilities, and rows gone wrong.

T tokens of the step, E hidden size, V vocabulary
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stage_worker.batch import PlacedRow
from stage_worker.candidates import all_finite
from stage_worker.sampler import (
    Known,
    SampleRequest,
    describe,
    is_plain_greedy,
    sample,
)
from stagemesh.plan import NOT_FINITE, RowResult, SampledToken, Step

# Logits of this many prompt tokens are held at once: their vocabulary may be large.
_PROMPT_SLICE = 64


@dataclass(slots=True)
class _Answer:
    sampled: list[SampledToken] = field(default_factory=list)
    prompt_logprobs: list[SampledToken] = field(default_factory=list)
    failed: bool = False


class RowSampler:
    """`logits` maps hidden states [n, E] to logits [n, V] in float32, `greedy` to the likeliest
    token of each, -1 where numbers are not finite.

    Where a group of ranks computes, all of them ask for the same, and only the first one gets
    logits: what the others answer is nobody's business.
    """

    def __init__(
        self, logits: Callable[[Tensor], Tensor | None], greedy: Callable[[Tensor], list[int]]
    ) -> None:
        self._logits = logits
        self._greedy = greedy

    def results(self, step: Step, placed: Rows[PlacedRow], hidden: Tensor) -> tuple[RowResult, ...]:
        """One result per row of the step, in order; rows that passed this stage by have no content.

        hidden: [T, E]. A row is in error if any of its own numbers is not finite.
        """
        answers: dict[int, _Answer] = defaultdict(_Answer)
        if all(map(_is_plain_greedy, placed)):
            self._add_greedy(placed, hidden, answers)
            return tuple(_result(row.sequence_id, row.run, answers[id(row)]) for row in step.rows)
        finite = all_finite(hidden).tolist()
        for entry in placed:
            own = finite[entry.first : entry.first + entry.row.num_tokens]
            answers[id(entry.row)].failed = not all(own)
        healthy = [entry for entry in placed if not answers[id(entry.row)].failed]
        self._add_sampled(healthy, hidden, answers)
        self._add_prompt_logprobs(healthy, hidden, answers)
        return tuple(_result(row.sequence_id, row.run, answers[id(row)]) for row in step.rows)

    def _add_greedy(
        self, placed: Rows[PlacedRow], hidden: Tensor, answers: dict[int, _Answer]
    ) -> None:
        """The common case, in which the device need be waited for only once. What is not finite in
        hidden states makes all logits NaN."""
        tokens = self._greedy(hidden) if placed else []
        for entry, token in zip(placed, tokens, strict=True):
            answer, position = answers[id(entry.row)], entry.row.start + 1
            answer.failed = token < 0
            if not answer.failed:
                answer.sampled.append(SampledToken(position, token))
                entry.sequence.append(position, token)

    def _add_sampled(
        self, placed: Rows[PlacedRow], hidden: Tensor, answers: dict[int, _Answer]
    ) -> None:
        wanted = [(entry, p) for entry in placed for p in entry.row.sample_positions]
        if not wanted:
            return
        requests = [_request(entry, position) for entry, position in wanted]
        logits = self._logits(hidden[_indices(wanted, hidden)])
        if logits is None:
            return
        for (entry, position), token in zip(wanted, sample(logits, requests), strict=True):
            answer = answers[id(entry.row)]
            if token is None:
                answer.failed = True
                continue
            answer.sampled.append(token)
            if position + 1 == entry.row.start + entry.row.num_tokens:
                entry.sequence.append(token.position, token.token_id)

    def _add_prompt_logprobs(
        self, placed: Rows[PlacedRow], hidden: Tensor, answers: dict[int, _Answer]
    ) -> None:
        """Plain log-probabilities of known tokens: bias and penalties shape choices only."""
        wanted = [(entry, p) for entry in placed for p in entry.row.logprob_positions]
        for some in _slices(wanted, _PROMPT_SLICE):
            known = [_known(*each) for each in some]
            logits = self._logits(hidden[_indices(some, hidden)])
            if logits is None:
                continue
            finite = all_finite(logits).tolist()
            told = describe(logits.log_softmax(dim=1), known)
            for (entry, _), token, is_finite in zip(some, told, finite, strict=True):
                answer = answers[id(entry.row)]
                if is_finite:
                    answer.prompt_logprobs.append(token)
                else:
                    answer.failed = True


def _is_plain_greedy(entry: PlacedRow) -> bool:
    """A lone token after which the likeliest one is chosen, and nothing told of it but its id."""
    row, sequence = entry.row, entry.sequence
    return (
        row.num_tokens == 1
        and len(row.sample_positions) == 1
        and not row.logprob_positions
        and is_plain_greedy(sequence.state.sampling)
    )


def _known(entry: PlacedRow, position: int) -> Known:
    """The token after a position."""
    sequence = entry.sequence
    num_alternatives = sequence.state.sampling.num_prompt_logprobs or 0
    return Known(position + 1, sequence.token_at(position + 1), num_alternatives)


def _request(entry: PlacedRow, position: int) -> SampleRequest:
    state = entry.sequence.state
    return SampleRequest(
        position=position + 1,
        spec=state.sampling,
        prompt_token_ids=state.prompt_token_ids,
        output_token_ids=entry.sequence.history(position),
    )


def _indices(wanted: Iterable[tuple[PlacedRow, int]], hidden: Tensor) -> Tensor:
    return torch.tensor(
        [entry.first + position - entry.row.start for entry, position in wanted],
        device=hidden.device,
    )


def _slices(
    wanted: list[tuple[PlacedRow, int]], size: int
) -> Iterable[list[tuple[PlacedRow, int]]]:
    return (wanted[start : start + size] for start in range(0, len(wanted), size))


def _result(sequence_id: int, run: int, answer: _Answer) -> RowResult:
    if answer.failed:
        return RowResult(sequence_id, run, error=NOT_FINITE)
    return RowResult(sequence_id, run, tuple(answer.sampled), tuple(answer.prompt_logprobs))
