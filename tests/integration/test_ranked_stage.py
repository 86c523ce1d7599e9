"""A stage of two processes, in hand: what goes wrong on every rank, and what on one only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support.stages import WHOLE_DEMO
from support.waiting import wait_until

from stage_worker.executor import ExecutorConfig
from stage_worker.rank_processes import RankProcesses
from stage_worker.ranked_stage import RankedStage
from stage_worker.tenancy import Joining
from stagemesh.errors import CheckpointError, InternalError, PeerLost, ProtocolError
from stagemesh.plan import BlockUpdate, Epoch, Row, SequenceState, Step
from stagemesh.sampling import SamplingSpec

PROMPT = (1, 2, 3)


@pytest.fixture
def ranks() -> Iterator[RankProcesses]:
    processes = RankProcesses(2)
    yield processes
    processes.kill()


def load(ranks: RankProcesses, config: ExecutorConfig = WHOLE_DEMO) -> RankedStage:
    return RankedStage.load(config, lambda *_: None, ranks, ranks.own.open_group())


def joined(ranks: RankProcesses) -> RankedStage:
    stage = load(ranks)
    blocks = stage.facts.blocks_for(4)
    stage.join(Joining(pipeline_id="p", stage=0, num_stages=1, blocks=blocks))
    return stage


def step(number: int, *token_ids: int) -> Step:
    row = Row(
        sequence_id=1,
        run=number,
        start=0,
        num_tokens=len(token_ids),
        token_ids=token_ids,
        block_updates=(BlockUpdate(0, (0,)),),
        first_stage=0,
        end_stage=1,
        sample_positions=(len(token_ids) - 1,),
        state=SequenceState(token_ids, (), SamplingSpec(temperature=0.0, num_logprobs=1), 8),
    )
    return Step("p", Epoch(1, 1), number, (row,))


def test_a_step_that_is_wrong_is_wrong_on_every_rank(ranks: RankProcesses) -> None:
    stage = joined(ranks)
    before = stage.execute(step(0, *PROMPT), b"", "")
    with pytest.raises(ProtocolError, match="outside of the vocabulary"):
        stage.execute(step(1, 1, 2, 10**6), b"", "")
    after = stage.execute(step(2, *PROMPT), b"", "")
    assert after.rows[0].sampled == before.rows[0].sampled
    assert stage.num_sequences == 1


def test_a_step_that_fails_on_one_rank_only_ends_all(
    ranks: RankProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = joined(ranks)

    def fail(*_: object) -> None:
        raise RuntimeError("not here")

    monkeypatch.setattr(stage._own, "execute", fail)
    monkeypatch.setattr("stage_worker.other_ranks._OUTCOME_TIMEOUT_S", 0.5)
    with pytest.raises(InternalError, match="one rank failed and others did not"):
        stage.execute(step(0, *PROMPT), b"", "")
    wait_until(lambda: not alive(ranks), 10.0, "the other rank to end")


def test_a_load_that_fails_leaves_ranks_that_can_load(ranks: RankProcesses, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load(ranks, replace(WHOLE_DEMO, model_dir=tmp_path))
    assert alive(ranks)
    assert load(ranks).facts.num_blocks == 4


def test_a_rank_that_is_gone_is_told(ranks: RankProcesses) -> None:
    stage = joined(ranks)
    ranks.kill_processes()
    wait_until(lambda: not alive(ranks), 10.0, "the other rank to end")
    with pytest.raises(PeerLost):
        stage.forget()


def alive(ranks: RankProcesses) -> bool:
    return all(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        for pid in ranks.pids
    )
