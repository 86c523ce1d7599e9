"""Bugs planted in the core on purpose: the simulator must find each, or it proves nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import pytest
from simulation.fake_stage import BrokenPlan
from simulation.oracle import Violation
from simulation.planting import caught

from scheduler.core import batch, prefix, results, scheduler
from scheduler.core.blocks import BlockPool
from scheduler.core.in_flight import StepInFlight
from scheduler.core.lacks import RebuildPart
from scheduler.core.pipeline import Pipeline
from scheduler.core.scheduler import SchedulerCore
from scheduler.core.sequence import Sequence
from scheduler.core.table import BlockTable
from stagemesh.plan import BlockUpdate, Row, RowResult, SequenceState, Step, StepResult


def test_a_page_that_is_reused_while_its_content_is_still_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def take_free(self: BlockPool) -> int:
        return self._blank.pop() if self._blank else self._cached.popitem(last=False)[0]

    monkeypatch.setattr(BlockPool, "_take_free", take_free)
    assert isinstance(caught(), Violation)


def test_a_prefix_hit_that_claims_one_block_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    admit = Pipeline.admit

    def admit_too_far(self: Pipeline, sequence: Sequence, hits: list[tuple[int, ...]]) -> None:
        admit(self, sequence, hits)
        further = sequence.num_computed + self.facts.block_size_tokens
        if hits and further < sequence.num_tokens:
            sequence.table.grow(self.pool, len(hits) + 1)
            sequence.num_computed = sequence.num_scheduled = further

    monkeypatch.setattr(Pipeline, "admit", admit_too_far)
    assert "right is" in str(caught())


def test_positions_in_flight_that_a_new_epoch_takes_for_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rewind(self: Sequence) -> None:
        # At least one token stays to be scheduled, or the bug would merely hang.
        self.num_scheduled = self.num_computed = min(self.num_scheduled, self.num_tokens - 1)
        self.needs_state = True

    monkeypatch.setattr(Sequence, "rewind", rewind)
    caught()


def test_a_result_that_is_taken_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    take_rows = SchedulerCore._take_rows

    def take_twice(
        self: SchedulerCore, pipeline: Pipeline, done: StepInFlight, answers: tuple[RowResult, ...]
    ) -> int:
        take_rows(self, pipeline, done, answers)
        return take_rows(self, pipeline, done, answers)

    monkeypatch.setattr(SchedulerCore, "_take_rows", take_twice)
    assert isinstance(caught(), Violation)


def test_a_result_of_an_older_run_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    take_rows = SchedulerCore._take_rows

    def take_all(
        self: SchedulerCore, pipeline: Pipeline, done: StepInFlight, answers: tuple[RowResult, ...]
    ) -> int:
        pairs = zip(done.step.rows, done.sequences, strict=True)
        rows = tuple(replace(row, run=sequence.run) for row, sequence in pairs)
        as_if = replace(done, step=replace(done.step, rows=rows))
        return take_rows(self, pipeline, as_if, answers)

    monkeypatch.setattr(SchedulerCore, "_take_rows", take_all)
    caught()


def test_a_result_of_an_older_epoch_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    match_result = results.match_result

    def match_any_epoch(pipeline: Pipeline, result: StepResult) -> object:
        as_if = StepResult(result.pipeline_id, pipeline.epoch, result.step, result.rows)
        return match_result(pipeline, as_if)

    monkeypatch.setattr(scheduler, "match_result", match_any_epoch)
    caught()


def test_a_prefix_hash_that_ignores_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    block_hash = prefix.block_hash
    monkeypatch.setattr(prefix, "block_hash", lambda parent, tokens: block_hash(b"", tokens))
    assert "right is" in str(caught())


def test_a_prefix_shared_between_different_rope_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    root_hash = prefix.root_hash
    from scheduler.core import sequence

    monkeypatch.setattr(sequence, "root_hash", lambda *parts: root_hash(*parts[:-1], 0))
    assert "right is" in str(caught())


def test_a_prefix_shared_between_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    root_hash = prefix.root_hash
    from scheduler.core import sequence

    monkeypatch.setattr(
        sequence, "root_hash", lambda model, adapter, *rest: root_hash(model, "", *rest)
    )
    assert "right is" in str(caught())


def test_a_block_leaked_when_a_sequence_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def release(self: BlockTable, pool: BlockPool) -> None:
        for group in self.groups:
            pool.release(group[1:] if len(group) > 3 else group)
            group.clear()
        self._num_sent = 0

    monkeypatch.setattr(BlockTable, "release", release)
    caught()


def test_an_abort_that_forgets_the_blocks_is_noticed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def release(self: BlockTable, pool: BlockPool) -> None:
        self.discard()

    monkeypatch.setattr(BlockTable, "release", release)
    assert "owner" in str(caught(check_integrity=True))


def test_a_shared_block_that_counts_one_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    share = BlockPool.share

    def share_without_counting(self: BlockPool, block_id: int) -> None:
        if self.num_owners(block_id) == 0:
            share(self, block_id)

    monkeypatch.setattr(BlockPool, "share", share_without_counting)
    caught()


def test_blocks_named_before_they_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    send = Pipeline.send

    def send_and_name(
        self: Pipeline,
        rows: tuple[Row, ...],
        sequences: tuple[Sequence, ...],
        rebuilds: Mapping[int, RebuildPart],
        now_ns: int,
    ) -> Step:
        for row, sequence in zip(rows, sequences, strict=True):
            computed = sequence.num_computed
            sequence.num_computed = row.end
            self.name_computed_blocks(sequence)
            sequence.num_computed = computed
        return send(self, rows, sequences, rebuilds, now_ns)

    monkeypatch.setattr(Pipeline, "send", send_and_name)
    caught()


def test_a_hit_on_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sequence, "max_hit_tokens", property(lambda self: self.num_tokens))
    caught()


def test_output_that_is_counted_as_prompt_after_a_preemption(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def state(self: Sequence) -> SequenceState:
        tokens = tuple(self.tokens)
        return SequenceState(tokens, (), self.request.sampling, self.request.total_length)

    monkeypatch.setattr(Sequence, "state", state)
    assert isinstance(caught(), Violation)


def test_a_block_table_that_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    take_updates = BlockTable.take_updates

    def take_new_only(self: BlockTable, *, whole: bool) -> tuple[BlockUpdate, ...]:
        return take_updates(self, whole=False)

    monkeypatch.setattr(BlockTable, "take_updates", take_new_only)
    assert isinstance(caught(), BrokenPlan)


def test_a_sequence_that_the_stages_are_never_told_to_forget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    suspend = Pipeline.suspend

    def suspend_forgetfully(self: Pipeline, now_ns: int) -> None:
        self.in_flight.clear()
        suspend(self, now_ns)

    monkeypatch.setattr(Pipeline, "suspend", suspend_forgetfully)
    assert "hold sequences for ever" in str(caught())


def test_prompt_logprobs_that_a_preemption_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    def wanted(self: Sequence) -> range:
        is_wanted = self.request.sampling.num_prompt_logprobs is not None
        is_wanted = is_wanted and not self.request.output_token_ids
        return range(self.num_prompt_tokens - 1) if is_wanted else range(0)

    monkeypatch.setattr(Sequence, "wanted_prompt_logprobs", property(wanted))
    assert "log-probabilities" in str(caught())


def test_an_end_that_is_told_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    take_events = SchedulerCore.take_events

    def take_with_echo(self: SchedulerCore) -> Iterable[object]:
        events = take_events(self)
        return [*events, *events[-1:]]

    monkeypatch.setattr(SchedulerCore, "take_events", take_with_echo)
    assert isinstance(caught(), Violation)


def test_a_deadline_that_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.core.deadlines.Deadlines.expired", lambda self, now_ns: [])
    assert "deadline" in str(caught())


def test_chunks_that_skip_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    row = batch.Batch._row

    def row_with_a_hole(self: batch.Batch, part: batch._Part) -> object:
        if part.start == 0 and part.end - part.start > 1:
            part.sequence.num_scheduled += part.end < part.sequence.num_tokens
        return row(self, part)

    monkeypatch.setattr(batch.Batch, "_row", row_with_a_hole)
    assert isinstance(caught(), Violation)
