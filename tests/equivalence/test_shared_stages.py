"""Stages that serve two pipelines give each of them, to the last bit, what it would get alone.

Blocks, sequences and steps of both have the same ids all along.
"""

from __future__ import annotations

import functools

import pytest
import torch
from support.checkpoints import prompts
from support.paths import DEMO_MODEL
from support.rebuilding import Rebuilder
from support.stages import Chain, Live, Wish

from stage_worker.executor import StageExecutor
from stagemesh.model_spec import ModelSpec
from stagemesh.sampling import SamplingSpec

BLOCK_SIZE = 8
NUM_BLOCKS = 48
NUM_HALF = NUM_BLOCKS // 2
SEEDED = SamplingSpec(temperature=0.8, seed=5, top_p=0.95, num_logprobs=3, repetition_penalty=1.2)
SEEDS = {"p": 1, "q": 2}

Facts = list[tuple[object, ...]]


def wishes(pipeline_id: str) -> list[Wish]:
    given = prompts(4, (50, 4, 27, 1), 512, SEEDS[pipeline_id])
    return [Wish(prompt, 9, SEEDED, prompt_logprobs=True) for prompt in given]


def new_chain(num_stages: int, *, pipeline_id: str = "p", num_logged: int | None = None) -> Chain:
    block_bytes = ModelSpec.from_directory(DEMO_MODEL).hidden_size * BLOCK_SIZE * 4
    chain = Chain(
        DEMO_MODEL,
        num_stages,
        batch_invariant=True,
        block_size_tokens=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        max_log_memory_bytes=None if num_logged is None else num_logged * block_bytes,
        pipeline_id=pipeline_id,
    )
    chain.free_blocks = [block for block in chain.free_blocks if block < NUM_HALF]
    return chain


def facts(lives: list[Live]) -> Facts:
    return [(live.sampled, live.prompt_logprobs) for live in lives]


@functools.cache
def alone() -> dict[str, Facts]:
    return {name: facts(new_chain(1).run(wishes(name))) for name in SEEDS}


def begun(chain: Chain) -> tuple[list[Live], Rebuilder]:
    lives = [chain.start(wish) for wish in wishes(chain.pipeline_id)]
    return lives, Rebuilder(chain, chunk=9, lost=[], use_log=True, alive=list(lives))


def rebuilding(before: Rebuilder, lost: list[int], *, use_log: bool = True) -> Rebuilder:
    return Rebuilder(before.chain, chunk=11, lost=lost, use_log=use_log, alive=before.alive)


def interleave(one: Rebuilder, other: Rebuilder, max_turns: int = 1000) -> None:
    """A step of this, two of that."""
    for _ in range(max_turns):
        for rebuilder, num_rows in ((one, 3), (other, 2), (other, 1)):
            if rebuilder.alive:
                rebuilder.step(num_rows)
        if not one.alive and not other.alive:
            break


@torch.inference_mode()
def spoil(stage: StageExecutor) -> None:
    """What was not written by the time it is read makes everything NaN."""
    for pages in (*stage.cache.memory, stage.log.pages):
        pages.fill_(float("nan"))


@pytest.mark.parametrize("num_stages", [1, 3])
def test_interleaved_steps(num_stages: int) -> None:
    first = new_chain(num_stages)
    first.resize(NUM_HALF)
    last = first.beside("q", num_blocks=NUM_HALF)
    for stage in first.stages:
        spoil(stage)
    lives, one = begun(first)
    other_lives, other = begun(last)
    interleave(one, other)
    assert facts(lives) == alone()["p"]
    assert facts(other_lives) == alone()["q"]


@pytest.mark.parametrize("num_logged", [None, 20, 0], ids=["whole log", "short log", "no log"])
def test_a_stage_of_one_pipeline_stands_in_for_that_of_another(num_logged: int | None) -> None:
    """Stage 1 of q is lost, and p's serves q too: its part is rebuilt from the log of q's stage 0.
    Then stage 2 is lost as well: what p's stage 1 logged at its end for q rebuilds it."""
    first = new_chain(3, num_logged=num_logged)
    last = new_chain(3, pipeline_id="q", num_logged=num_logged)
    lives, one = begun(first)
    other_lives, other = begun(last)
    interleave(one, other, max_turns=4)
    for lost in (1, 2):
        assert one.alive
        assert other.alive
        stand_in(first, last, lost, None if num_logged is None else num_logged // 2)
        other = rebuilding(other, [lost], use_log=num_logged != 0)
        one = rebuilding(one, [])
        interleave(one, other, max_turns=9 if lost == 1 else 1000)
    assert facts(lives) == alone()["p"]
    assert facts(other_lives) == alone()["q"]


def stand_in(first: Chain, last: Chain, lost: int, num_log_blocks: int | None) -> None:
    first.num_log_blocks = last.num_log_blocks = num_log_blocks
    first.resize(NUM_HALF)
    last.stages[lost], last.from_end[lost] = first.stages[lost], True
    last.resize(NUM_HALF, lost=[lost])


def test_pages_go_from_one_end_to_the_other() -> None:
    """From the end of a shared worker's memory to the start of a fresh one's, log and all; then the
    next stage is lost, and rebuilt from that log."""
    first = new_chain(3)
    first.resize(NUM_HALF)
    last = first.beside("q", num_blocks=NUM_HALF)
    lives, one = begun(first)
    other_lives, other = begun(last)
    interleave(one, other, max_turns=5)
    assert other.alive
    fresh = new_chain(3)
    spoil(fresh.stages[1])
    in_use = sorted({block for live in other.alive for block in live.blocks})
    batch = last.stages[1].pages.read(last.blocks(1).order(in_use), last.blocks(1))
    last.stages[1], last.from_end[1] = fresh.stages[1], False
    last.resize(NUM_HALF, lost=[1])
    last.stages[1].pages.write(batch, last.blocks(1))
    last.lose([2])
    interleave(rebuilding(one, []), rebuilding(other, [2]))
    assert facts(lives) == alone()["p"]
    assert facts(other_lives) == alone()["q"]
