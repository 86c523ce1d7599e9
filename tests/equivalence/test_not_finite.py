"""NaN stays with the sequence that has it: stale pages and masked positions touch nobody."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import SIZES, TinyModel, prompts, tiny_model
from support.stages import Chain, Live, Wish

from stagemesh.plan import NOT_FINITE, SampledToken

MODELS = [
    TinyModel("plain", "LlamaConfig"),
    TinyModel("window", "MistralConfig", {"sliding_window": 9}),
]
NAN, INF = float("nan"), float("inf")


def wishes() -> list[Wish]:
    return [
        Wish(p, 12, prompt_logprobs=True)
        for p in prompts(4, (21, 3, 12, 30), SIZES["vocab_size"], 9)
    ]


Facts = tuple[list[SampledToken], list[SampledToken], str | None]


def facts(live: Live) -> Facts:
    return live.sampled, live.prompt_logprobs, live.error


def check_same(got: Facts, expected: Facts, exact: bool) -> None:
    """In another batch, or with blocks in another order, the last bits may differ, unless it was
    promised that they do not."""
    if exact:
        assert got == expected
    assert got[2] is None
    for one, other in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@torch.inference_mode()
def poison(chain: Chain, blocks: list[int], value: float) -> None:
    for stage in chain.stages:
        for pages in (*stage.cache.keys, *stage.cache.values):
            pages[blocks] = value


@torch.inference_mode()
def poison_beyond(chain: Chain, live: Live, value: float) -> None:
    """All slots of the sequence's own blocks that hold no executed token."""
    size = chain.block_size_tokens
    for stage in chain.stages:
        for pages in (*stage.cache.keys, *stage.cache.values):
            for position in range(live.computed, len(live.blocks) * size):
                pages[live.blocks[position // size], position % size] = value


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["fast", "invariant"])
@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("value", [NAN, INF])
def test_stale_pages_are_harmless(
    model: TinyModel, batch_invariant: bool, value: float, tmp_path: Path
) -> None:
    tiny_model(model, tmp_path)
    chain = Chain(tmp_path / model.name, 2, batch_invariant=batch_invariant, num_blocks=64)
    clean = [facts(live) for live in chain.run(wishes(), chunk=5)]

    def plant(alive: list[Live]) -> None:
        held = {block for live in alive for block in live.blocks}
        poison(chain, [block for block in range(64) if block not in held], value)
        for live in alive:
            poison_beyond(chain, live, value)

    chain.free_blocks.sort()  # the same blocks in another order
    got = [facts(live) for live in chain.run(wishes(), chunk=5, before_step=plant)]
    for one, other in zip(got, clean, strict=True):
        check_same(one, other, batch_invariant)


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["fast", "invariant"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_broken_sequence_ends_alone(batch_invariant: bool, value: float, tmp_path: Path) -> None:
    """One sequence's own past is broken in mid-generation; its neighbours' bits stay."""
    model = MODELS[0]
    tiny_model(model, tmp_path)
    chain = Chain(tmp_path / model.name, 3, batch_invariant=batch_invariant, num_blocks=64)
    clean = [facts(live) for live in chain.run(wishes(), chunk=5)]

    def plant(alive: list[Live]) -> None:
        victim = next((live for live in alive if live.wish.prompt == wishes()[2].prompt), None)
        if victim is not None and len(victim.sampled) == 4:
            poison(chain, [victim.blocks[0]], value)

    lives = chain.run(wishes(), chunk=5, before_step=plant)
    assert lives[2].error == NOT_FINITE
    assert len(lives[2].sampled) == 4
    for i in (0, 1, 3):
        check_same(facts(lives[i]), clean[i], batch_invariant)
    # The blocks of the broken one are used again, with what it left in them.
    chain.free_blocks.sort(key=lambda block: block not in lives[2].blocks, reverse=True)
    again = [facts(live) for live in chain.run(wishes(), chunk=5)]
    for one, other in zip(again, clean, strict=True):
        check_same(one, other, batch_invariant)


def test_a_chunk_that_samples_nothing_is_in_error_too(tmp_path: Path) -> None:
    model = MODELS[0]
    tiny_model(model, tmp_path)
    chain = Chain(tmp_path / model.name, 1)
    live = chain.start(Wish(prompts(1, (20,), SIZES["vocab_size"], 1)[0], 4))
    row = live.row(1, 8)
    live.take(row, chain.execute([row])[0])
    poison(chain, [live.blocks[0]], NAN)
    row = live.row(1, 8)
    assert not row.sample_positions
    assert chain.execute([row])[0].error == NOT_FINITE
