"""One stage in two pipelines: what either holds of sequences and pages is its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from support.checkpoints import TinyModel, tiny_model
from support.stages import GREEDY, Chain

from stage_worker.executor import StageExecutor
from stagemesh.errors import ProtocolError
from stagemesh.plan import BlockUpdate, Row, SequenceRun, SequenceState

NUM_BLOCKS, BLOCK_SIZE = 8, 4
PROMPT = (5, 6, 7, 8, 9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_model(TinyModel("tiny", "LlamaConfig", {"num_hidden_layers": 2}), directory)
    return directory / "tiny"


@pytest.fixture
def both(model: Path) -> tuple[Chain, Chain]:
    """The pages are marked: whatever is written is seen."""
    first = Chain(model, 2, num_blocks=NUM_BLOCKS, block_size_tokens=BLOCK_SIZE)
    first.resize(5)
    for stage in first.stages:
        mark(stage)
    return first, first.beside("q", num_blocks=3)


@torch.inference_mode()
def mark(stage: StageExecutor) -> None:
    for pages in (*stage.cache.memory, stage.log.pages):
        pages.fill_(7.0)


def written(stage: StageExecutor) -> tuple[set[int], set[int]]:
    """Blocks of the KV, and of the log."""
    kv, log = (
        {block for block in range(len(pages)) if bool((pages[block] != 7.0).any())}
        for pages in (stage.cache.memory[0], stage.log.pages)
    )
    return kv, log


def first_row(*blocks: int, run: int = 0) -> Row:
    state = SequenceState(PROMPT, (), GREEDY, 12)
    update = BlockUpdate(0, blocks)
    return Row(1, run, 0, 5, PROMPT, (update,), 0, 2, sample_positions=(4,), state=state)


def next_row(token: int) -> Row:
    return Row(1, 0, 5, 1, (token,), (), 0, 2, sample_positions=(5,))


def test_blocks_from_the_end_are_written_there(both: tuple[Chain, Chain]) -> None:
    first, last = both
    last.execute([first_row(0, 2)])
    assert written(last.stages[0]) == ({7, 5}, {7, 5})
    first.execute([first_row(0, 2)])
    assert written(last.stages[0]) == ({7, 5, 0, 2}, {7, 5, 0, 2})
    assert written(last.stages[1]) == ({7, 5, 0, 2}, set()), "the last stage has no log"


@pytest.mark.parametrize(("num_log_blocks", "logged"), [(None, {1, 0}), (2, {1})])
def test_a_short_log_is_written_from_its_end(
    model: Path, num_log_blocks: int | None, logged: set[int]
) -> None:
    num_bytes = 3 * BLOCK_SIZE * 64 * 4
    chain = Chain(
        model, 2, num_blocks=8, block_size_tokens=BLOCK_SIZE, max_log_memory_bytes=num_bytes
    )
    for stage in chain.stages:
        mark(stage)
    last = chain.beside("q", num_blocks=8)
    last.num_log_blocks = num_log_blocks
    last.join(keep_kv=False)
    last.execute([first_row(1, 2), dataclasses.replace(first_row(3, 5), sequence_id=2)])
    assert written(last.stages[0]) == ({6, 5, 4, 2}, logged)


def test_sequences_of_the_same_id_are_two(both: tuple[Chain, Chain]) -> None:
    first, last = both
    (one,) = first.execute([first_row(0, 1)])
    with pytest.raises(ProtocolError, match="brings no state"):
        last.execute([next_row(one.sampled[0].token_id)])
    (other,) = last.execute([first_row(0, 1)])
    assert other == one
    assert [stage.num_sequences for stage in first.stages] == [2, 2]
    last.execute([], [SequenceRun(1, 0)])
    assert [stage.num_sequences for stage in first.stages] == [1, 1]
    assert first.execute([next_row(one.sampled[0].token_id)])[0].sampled


def test_each_has_its_own_number_of_blocks(both: tuple[Chain, Chain]) -> None:
    first, last = both
    first.execute([first_row(3, 4)])
    with pytest.raises(ProtocolError, match="outside of the pipeline's 3"):
        last.execute([first_row(3, 4)])


def test_a_pipeline_that_never_joined(both: tuple[Chain, Chain]) -> None:
    first, _ = both
    first.pipeline_id = "r"
    with pytest.raises(ProtocolError, match="a step of r came before"):
        first.execute([first_row(0, 1)])


def test_one_shrinks_and_the_other_grows(both: tuple[Chain, Chain]) -> None:
    """What a sequence had in blocks that are gone now is not touched by it any more: it has to be
    told of others."""
    first, last = both
    (result,) = first.execute([first_row(0, 4)])
    first.resize(4)
    last.resize(4)
    token = result.sampled[0].token_id
    with pytest.raises(ProtocolError, match="blocks hold 4 tokens"):
        first.execute([next_row(token)])
    again = dataclasses.replace(first_row(), block_updates=())
    with pytest.raises(ProtocolError, match="blocks hold 4 tokens"):
        first.execute([again])
    last.execute([first_row(0, 3)])
    for stage in first.stages:
        mark(stage)
    (rebuilt,) = first.execute([first_row(0, 3)])
    assert rebuilt == result
    assert written(first.stages[0])[0] == {0, 3}
    first.resize(2)
    last.resize(6)
    with pytest.raises(ProtocolError, match="blocks hold 4 tokens"):
        first.execute([next_row(token)])
    first.execute([first_row(0, 1)])
    last.execute([next_row(token)])


def test_kv_is_kept_by_end(both: tuple[Chain, Chain]) -> None:
    first, last = both
    (result,) = first.execute([first_row(0, 1)])
    last.execute([first_row(0, 1)])
    token = result.sampled[0].token_id
    last.join(keep_kv=True)
    assert last.execute([next_row(token)])[0].sampled
    last.join(keep_kv=False)
    with pytest.raises(ProtocolError, match="brings no state"):
        last.execute([next_row(token)])
    assert first.execute([next_row(token)])[0].sampled
    last.from_end = [False, False]  # it moves to the end where the other one was
    last.join(keep_kv=True)
    assert [stage.num_sequences for stage in first.stages] == [0, 0]
    with pytest.raises(ProtocolError, match="a step of p came before"):
        first.execute([next_row(token)])
    assert last.execute([first_row(0, 1)]) == (result,)


def test_a_pipeline_that_changes_ends_leaves_the_one_it_had(both: tuple[Chain, Chain]) -> None:
    first, _ = both
    (result,) = first.execute([first_row(0, 1)])
    first.from_end = [True, True]
    first.join(keep_kv=False)
    assert [stage.num_sequences for stage in first.stages] == [0, 0]
    first.execute([first_row(0, 1, run=1)])
    assert [stage.num_sequences for stage in first.stages] == [1, 1]
    assert first.execute([first_row(0, 1, run=1)])[0].sampled == result.sampled
