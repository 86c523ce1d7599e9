"""A seeded request gives the same tokens alone, in a batch of 32, cut into stages, and resumed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from support.checkpoints import prompts
from support.paths import shared
from support.stages import Chain, Live, Wish

from stagemesh.sampling import SamplingSpec

MODEL = shared("models/stories260K")
NUM_TOKENS = 24
SPECS = [
    SamplingSpec(seed=1),
    SamplingSpec(seed=2**64 - 1, temperature=1.5, top_k=20),
    SamplingSpec(seed=3, temperature=0.7, top_p=0.9, repetition_penalty=1.2),
    SamplingSpec(seed=4, min_p=0.05, frequency_penalty=0.6, presence_penalty=-0.3),
    SamplingSpec(seed=5, logit_bias={100: 3.0, 7: -5.0}, min_tokens=10, stop_token_ids=(1, 2)),
]


def wishes(num: int) -> list[Wish]:
    lengths = (9, 1, 30, 17)
    return [
        Wish(prompt, NUM_TOKENS, SPECS[i % len(SPECS)])
        for i, prompt in enumerate(prompts(num, lengths, 512, 6))
    ]


def outputs(lives: Sequence[Live]) -> list[list[int]]:
    return [live.tokens[len(live.wish.prompt) :] for live in lives]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    return outputs(Chain(MODEL, 1).run(wishes(8), max_rows=1))


@pytest.mark.parametrize("num_stages", [1, 3])
def test_in_a_batch_of_32(num_stages: int, alone: list[list[int]]) -> None:
    chain = Chain(MODEL, num_stages)
    assert outputs(chain.run(wishes(32), chunk=7))[:8] == alone


def test_resumed_with_outputs_so_far(alone: list[list[int]]) -> None:
    """A new run after a preemption: penalties and min_tokens go on from the outputs it brings."""
    chain = Chain(MODEL, 2)
    resumed = [
        Wish(wish.prompt, NUM_TOKENS, wish.sampling, outputs=tokens[: 5 + i])
        for i, (wish, tokens) in enumerate(zip(wishes(8), alone, strict=True))
    ]
    assert outputs(chain.run(resumed, chunk=7)) == alone


def test_other_seeds_give_other_tokens(alone: list[list[int]]) -> None:
    other = [Wish(wish.prompt, NUM_TOKENS, SamplingSpec(seed=99)) for wish in wishes(8)]
    got = outputs(Chain(MODEL, 1).run(other))
    assert all(one != two for one, two in zip(got, alone, strict=True))


def test_a_step_executed_again_in_a_new_epoch_changes_nothing(alone: list[list[int]]) -> None:
    """The last stage had sampled and appended; the epoch ended before the scheduler heard of it."""
    chain = Chain(MODEL, 3)
    lives = [chain.start(wish) for wish in wishes(8)]
    while not all(live.done for live in lives):
        alive = [live for live in lives if not live.done]
        rows = [live.row(3, 7) for live in alive]
        lost = chain.execute(rows)
        if chain.num_steps % 4 == 1:  # this result is lost; KV is kept
            chain.join(keep_kv=True)
            for live in alive:
                live.first = True
            rows = [live.row(3, 7) for live in alive]
            lost = chain.execute(rows)
        for live, row, result in zip(alive, rows, lost, strict=True):
            live.take(row, result)
    assert outputs(lives) == alone
    held = [stage.num_sequences for stage in chain.stages]
    assert held == [8, 8, 8]
    chain.join(keep_kv=False)
    assert [stage.num_sequences for stage in chain.stages] == [0, 0, 0]
