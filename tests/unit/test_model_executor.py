"""What a stage refuses, passes by and forgets; plans are executed by the rule."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import TinyModel, tiny_model
from support.stages import EPOCH, GREEDY, Chain

from stage_worker.tenancy import Joining
from stagemesh.errors import ProtocolError
from stagemesh.plan import BlockUpdate, Row, SequenceRun, SequenceState, Step

PROMPT = (5, 6, 7, 8, 9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_model(TinyModel("tiny", "LlamaConfig", {"num_hidden_layers": 3}), directory)
    return directory / "tiny"


@pytest.fixture
def chain(model: Path) -> Chain:
    """Batch-invariant: elsewhere a row's last bits may differ with what it is computed beside."""
    return Chain(model, 3, batch_invariant=True, num_blocks=8, block_size_tokens=4)


def first_row(**changes: Any) -> Row:
    row = Row(
        sequence_id=1,
        run=0,
        start=0,
        num_tokens=5,
        token_ids=PROMPT,
        block_updates=(BlockUpdate(0, (3, 1)),),
        first_stage=0,
        end_stage=3,
        sample_positions=(4,),
        state=SequenceState(PROMPT, (), GREEDY, 12),
    )
    return dataclasses.replace(row, **changes)


def next_row(token: int, **changes: Any) -> Row:
    row = Row(1, 0, 5, 1, (token,), (), 0, 3, sample_positions=(5,))
    return dataclasses.replace(row, **changes)


def sampled(chain: Chain, row: Row) -> int:
    (result,) = chain.execute([row])
    (token,) = result.sampled
    return token.token_id


REFUSED = {
    "outside of the vocabulary": {"token_ids": (5, 6, 7, 8, 320)},
    "brings no state": {"state": None},
    "blocks hold 4 tokens": {"block_updates": (BlockUpdate(0, (3,)),)},
    "outside of the pipeline's 8": {"block_updates": (BlockUpdate(0, (3, 8)),)},
    "before index 1": {"block_updates": (BlockUpdate(1, (3,)),)},
    "one cache group": {"block_updates": (BlockUpdate(0, (3,)), BlockUpdate(0, (1,)))},
    "4 token ids for 5": {"token_ids": PROMPT[:4]},
    "samples outside": {"sample_positions": (5,)},
    "from the log of stage 0": {"input_from_log_of_stage": 0, "token_ids": ()},
    "from the log of stage None": {"first_stage": 1},
    "from the log of stage 1": {"first_stage": 1, "input_from_log_of_stage": 1, "token_ids": ()},
    "5 token ids for 5": {"first_stage": 1, "input_from_log_of_stage": 0},
    r"stages \[2, 2\)": {"first_stage": 2, "end_stage": 2},
    r"stages \[0, 4\)": {"end_stage": 4},
    "0 tokens from 0": {"num_tokens": 0, "token_ids": (), "sample_positions": ()},
}


@pytest.mark.parametrize(("message", "changes"), REFUSED.items(), ids=REFUSED)
def test_rows_that_contradict_the_rule(chain: Chain, message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match=message):
        chain.execute([first_row(**changes)])


def test_rows_of_known_sequences(chain: Chain) -> None:
    token = sampled(chain, first_row())
    with pytest.raises(ProtocolError, match="brings no state"):
        chain.execute([next_row(token, run=1)])
    sampled(chain, first_row(run=2))
    with pytest.raises(ProtocolError, match="older than run 2"):
        chain.execute([next_row(token, run=1)])


def test_forgetting_spares_later_runs(chain: Chain) -> None:
    sampled(chain, first_row(run=1))
    chain.execute([], [SequenceRun(1, 0), SequenceRun(77, 3)])
    assert [stage.num_sequences for stage in chain.stages] == [1, 1, 1]
    chain.execute([], [SequenceRun(1, 1)])
    assert [stage.num_sequences for stage in chain.stages] == [0, 0, 0]


def test_a_sequence_forgotten_and_begun_in_one_step(chain: Chain) -> None:
    token = sampled(chain, first_row())
    (result,) = chain.execute([first_row(run=1)], [SequenceRun(1, 0)])
    assert result.sampled[0].token_id == token


def test_start_truncates(chain: Chain) -> None:
    """Going back to an earlier position gives what was there before."""
    first = sampled(chain, first_row())
    second = sampled(chain, next_row(first))
    sampled(chain, next_row(second, start=6, sample_positions=(6,)))
    assert sampled(chain, next_row(first)) == second
    again = Row(1, 0, 2, 3, PROMPT[2:], (), 0, 3, sample_positions=(4,))
    assert sampled(chain, again) == first


def test_several_positions_of_one_row_are_sampled(chain: Chain, model: Path) -> None:
    """As drafts are verified: each position's token is that of its own prefix."""
    tokens = [sampled(chain, first_row())]
    for position in (5, 6):
        row = next_row(tokens[-1], start=position, sample_positions=(position,))
        tokens.append(sampled(chain, row))
    fresh = Chain(model, 1, num_blocks=8, block_size_tokens=4)
    row = first_row(
        num_tokens=7, token_ids=(*PROMPT, *tokens[:2]), sample_positions=(4, 5, 6), end_stage=1
    )
    (result,) = fresh.execute([row])
    assert [token.token_id for token in result.sampled] == tokens
    assert [token.position for token in result.sampled] == [5, 6, 7]


def test_a_stage_outside_of_a_rows_range_passes_it_by(chain: Chain) -> None:
    """A row for the first two stages only: it fills their KV, and comes back without content. The
    third takes over what it says of the sequence, whose next row brings no state."""
    short = first_row(end_stage=2, sample_positions=())
    other = first_row(sequence_id=2, block_updates=(BlockUpdate(0, (0, 2)),))
    results = chain.execute([short, other])
    assert [result.sequence_id for result in results] == [1, 2]
    assert not results[0].sampled
    assert results[0].error is None
    assert results[1].sampled
    assert [stage.num_sequences for stage in chain.stages] == [2, 2, 2]
    rest = first_row(
        first_stage=2, input_from_log_of_stage=1, token_ids=(), block_updates=(), state=None
    )
    (result,) = chain.execute([rest])
    chain.join(keep_kv=False)
    assert chain.execute([first_row()]) == (result,)


def test_blocks_that_are_not_logged_are_not_read(model: Path) -> None:
    """The log of the first stage holds two blocks, and the row's second block is the fourth."""
    num_bytes = 2 * 4 * 64 * 4
    chain = Chain(model, 2, num_blocks=8, block_size_tokens=4, max_log_memory_bytes=num_bytes)
    assert [stage.facts.num_log_blocks for stage in chain.stages] == [2, 0]
    row = first_row(block_updates=(BlockUpdate(0, (1, 3)),), end_stage=2)
    token = sampled(chain, row)
    changes = {"first_stage": 1, "input_from_log_of_stage": 0, "token_ids": ()}
    logged = dataclasses.replace(row, **changes, num_tokens=4, sample_positions=())
    assert chain.execute([logged])[0].sampled == ()
    with pytest.raises(ProtocolError, match=r"logs blocks \[0, 2\)"):
        chain.execute([dataclasses.replace(row, **changes)])
    assert sampled(chain, dataclasses.replace(row, run=1)) == token


def test_payloads_that_do_not_fit(chain: Chain) -> None:
    step = Step("p", EPOCH, 0, (first_row(),))
    payload = chain.stages[0].execute(step, b"", "").payload
    assert len(payload) == 5 * 64 * 4
    with pytest.raises(ProtocolError, match="bytes"):
        chain.stages[1].execute(step, payload[:-4], "float32")
    with pytest.raises(ProtocolError, match="bfloat16"):
        chain.stages[1].execute(step, payload, "bfloat16")
    for kind in (bytes, bytearray):  # at any address, writable or not
        shifted = memoryview(kind(b"x" + bytes(payload)))[1:]
        assert len(chain.stages[1].execute(step, shifted, "float32").payload) == len(payload)


def test_places_in_a_pipeline(chain: Chain) -> None:
    first = chain.stages[0]
    for place in ({"stage": 1, "num_stages": 3}, {"stage": 0, "num_stages": 1}):
        with pytest.raises(ProtocolError, match="cannot be stage"):
            first.join(Joining(pipeline_id="p", **place, blocks=first.facts.blocks_for(8)))
    with pytest.raises(ProtocolError, match="9 blocks"):
        first.facts.blocks_for(9)
    chain.resize(4)  # a smaller stage sets the pace
    with pytest.raises(ProtocolError, match="outside of the pipeline's 4"):
        first.execute(
            Step("p", EPOCH, 0, (first_row(block_updates=(BlockUpdate(0, (4, 1)),)),)), b"", ""
        )


def test_prompt_log_probabilities_come_without_sampling(chain: Chain) -> None:
    sampling = dataclasses.replace(GREEDY, num_prompt_logprobs=2)
    row = first_row(
        sample_positions=(),
        logprob_positions=(0, 1, 2, 3),
        state=SequenceState(PROMPT, (), sampling, 12),
    )
    (result,) = chain.execute([row])
    assert [token.token_id for token in result.prompt_logprobs] == list(PROMPT[1:])
    assert [token.position for token in result.prompt_logprobs] == [1, 2, 3, 4]
    assert all(len(token.alternatives) == 2 for token in result.prompt_logprobs)
    assert not result.sampled
