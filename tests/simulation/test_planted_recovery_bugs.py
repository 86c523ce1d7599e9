"""Bugs planted in what recovers lost stages: the simulator must find each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import pytest
from simulation.fake_stage import BrokenPlan, FakeStage
from simulation.oracle import Violation
from simulation.planting import caught

from scheduler.core import PipelineFacts, SchedulerCore, Tokens
from scheduler.core.batch import Batch
from scheduler.core.blocks import BlockPool
from scheduler.core.in_flight import StepInFlight
from scheduler.core.lacks import Lacks
from scheduler.core.pipeline import Pipeline
from scheduler.core.roster import Roster
from scheduler.core.sequence import Sequence
from scheduler.core.table import BlockTable
from stagemesh.plan import Row, RowResult, SampledToken


def is_wrong_token(error: Exception) -> bool:
    return isinstance(error, Violation) and "right is" in str(error)


def test_a_stale_page_after_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    lose = Lacks.lose

    def lose_but_one(self: Lacks, stage: int, needed: Mapping[int, int]) -> None:
        lose(self, stage, dict(list(needed.items())[1:]))

    monkeypatch.setattr(Lacks, "lose", lose_but_one)
    assert is_wrong_token(caught())


def _with_rebuild_rows_changed(monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    row = Batch._row

    def changed(self: Batch, part: object) -> Row:
        made = row(self, part)  # type: ignore[arg-type]
        is_rebuild = part.rebuild is not None  # type: ignore[attr-defined]
        return change(made) if is_rebuild else made  # type: ignore[operator]

    monkeypatch.setattr(Batch, "_row", changed)


def test_a_position_that_a_rebuild_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    def skip_one(row: Row) -> Row:
        if row.num_tokens < 2:
            return row
        return replace(
            row, start=row.start + 1, num_tokens=row.num_tokens - 1, token_ids=row.token_ids[1:]
        )

    _with_rebuild_rows_changed(monkeypatch, skip_one)
    assert is_wrong_token(caught())


def test_a_rebuild_row_that_writes_where_kv_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_rebuild_rows_changed(monkeypatch, lambda row: replace(row, first_writing_stage=0))
    assert "written again" in str(caught())


def test_a_rebuild_row_that_does_not_write_where_kv_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write_late(row: Row) -> Row:
        writing = max(row.first_stage, row.first_writing_stage)
        is_last = writing + 1 == row.end_stage
        return row if is_last else replace(row, first_writing_stage=writing + 1)

    _with_rebuild_rows_changed(monkeypatch, write_late)
    assert is_wrong_token(caught())


def test_a_rebuilt_position_that_is_taken_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    take_rows = SchedulerCore._take_rows

    def take(
        self: SchedulerCore, pipeline: Pipeline, done: StepInFlight, answers: tuple[RowResult, ...]
    ) -> int:
        return take_rows(self, pipeline, replace(done, rebuilds={}), answers)

    monkeypatch.setattr(SchedulerCore, "_take_rows", take)
    caught()


def test_a_log_that_is_asked_for_one_block_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    log_block = BlockTable.log_block
    monkeypatch.setattr(BlockTable, "log_block", lambda self, index: log_block(self, index) - 1)
    assert isinstance(caught(), BrokenPlan)


def test_a_log_that_is_read_one_block_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's bug, to see that the pretend ones would not hide it."""
    logged = FakeStage._logged

    def read_elsewhere(self: FakeStage, row: Row, held: object) -> object:
        table = held.table  # type: ignore[attr-defined]
        held.table = [max(0, block_id - 1) for block_id in table]  # type: ignore[attr-defined]
        states = logged(self, row, held)  # type: ignore[arg-type]
        held.table = table  # type: ignore[attr-defined]
        return states

    monkeypatch.setattr(FakeStage, "_logged", read_elsewhere)
    assert is_wrong_token(caught())


def test_a_resume_that_forgets_a_lost_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    resume = SchedulerCore.resume_pipeline

    def forget_one(
        self: SchedulerCore, facts: PipelineFacts, lost_stages: Collection[int], now_ns: int
    ) -> None:
        resume(self, facts, sorted(lost_stages)[1:], now_ns)

    monkeypatch.setattr(SchedulerCore, "resume_pipeline", forget_one)
    assert is_wrong_token(caught())


def test_a_cached_block_that_stays_known_though_a_stage_lost_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BlockPool, "forget_cached", lambda self: None)
    assert is_wrong_token(caught())


def test_a_shared_block_that_nobody_rebuilds(monkeypatch: pytest.MonkeyPatch) -> None:
    lose = Pipeline._lose

    def lose_what_is_not_shared(self: Pipeline, stages: Collection[int]) -> None:
        lose(self, stages)
        for block_id in range(self.pool.num_blocks):
            if self.pool.num_owners(block_id) > 1:
                self.lacks.drop(block_id)

    monkeypatch.setattr(Pipeline, "_lose", lose_what_is_not_shared)
    assert is_wrong_token(caught())


def test_a_block_that_is_shared_while_it_is_rebuilt_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Lacks, "is_in_making", lambda self, table: False)
    caught()


def test_a_block_given_up_half_rebuilt_and_still_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def drop_in_silence(self: Lacks, block_id: int) -> bool:
        drop(self, block_id)
        return False  # so that its name stays in the prefix index

    drop = Lacks.drop
    monkeypatch.setattr(Lacks, "drop", drop_in_silence)
    assert is_wrong_token(caught())


def test_rebuilding_that_an_epoch_s_end_takes_for_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def take_for_done(self: Lacks) -> None:
        self._in_making.clear()
        for stage, blocks in list(self._by_stage.items()):
            for block_id, lack in list(blocks.items()):
                lack.computed = lack.scheduled
                if lack.computed >= lack.needed:
                    self._remove(stage, block_id)

    monkeypatch.setattr(Lacks, "undo", take_for_done)
    assert is_wrong_token(caught())


def test_a_higher_attempt_that_appends_to_the_old_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deliver = Roster.deliver

    def deliver_after_the_old(self: Roster, sequence: Sequence, token: SampledToken) -> None:
        deliver(self, sequence, token)
        told = self._events[-1]
        assert isinstance(told, Tokens)
        num_old = len(sequence.request.output_token_ids)
        self._events[-1] = replace(told, index=told.index + num_old)

    monkeypatch.setattr(Roster, "deliver", deliver_after_the_old)
    assert "is next" in str(caught())
