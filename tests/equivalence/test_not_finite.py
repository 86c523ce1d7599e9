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
TOLERANCE = {"auto": 1e-4, "bfloat16": 1e-3, "int8": 1e-2}
NAN, INF = float("nan"), float("inf")


def wishes() -> list[Wish]:
    return [
        Wish(p, 12, prompt_logprobs=True)
        for p in prompts(4, (21, 3, 12, 30), SIZES["vocab_size"], 9)
    ]


Facts = tuple[list[SampledToken], list[SampledToken], str | None]


def facts(live: Live) -> Facts:
    return live.sampled, live.prompt_logprobs, live.error


def check_same(got: Facts, expected: Facts, exact: bool, kv_dtype: str = "auto") -> None:
    """In another batch, or with blocks in another order, the last bits may differ, unless it was
    promised that they do not; and what they are rounded to in the pages then differs by a step."""
    if exact:
        assert got == expected
    assert got[2] is None
    for one, other in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=TOLERANCE[kv_dtype])


@torch.inference_mode()
def poison(chain: Chain, blocks: list[int], value: float) -> None:
    size = chain.block_size_tokens
    _poison_slots(chain, [block * size + i for block in blocks for i in range(size)], value)


def _poison_slots(chain: Chain, slots: list[int], value: float) -> None:
    """As a step would write it, in whatever type the pages are."""
    for stage in chain.stages:
        shape = (len(slots), stage.spec.num_kv_heads, stage.spec.head_dim)
        numbers = torch.full(shape, value)
        for layer in range(stage.cache.num_layers):
            stage.cache.write(layer, torch.tensor(slots), numbers, numbers)


@torch.inference_mode()
def poison_beyond(chain: Chain, live: Live, value: float) -> None:
    """All slots of the sequence's own blocks that hold no executed token."""
    size = chain.block_size_tokens
    positions = range(live.computed, len(live.blocks) * size)
    slots = [live.blocks[position // size] * size + position % size for position in positions]
    _poison_slots(chain, slots, value)


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["fast", "invariant"])
@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("kv_dtype", TOLERANCE)
def test_stale_pages_are_harmless(
    model: TinyModel, batch_invariant: bool, value: float, kv_dtype: str, tmp_path: Path
) -> None:
    tiny_model(model, tmp_path)
    chain = Chain(
        tmp_path / model.name,
        2,
        batch_invariant=batch_invariant,
        num_blocks=64,
        kv_dtype=kv_dtype,
    )
    clean = [facts(live) for live in chain.run(wishes(), chunk=5)]

    def plant(alive: list[Live]) -> None:
        held = {block for live in alive for block in live.blocks}
        poison(chain, [block for block in range(64) if block not in held], value)
        for live in alive:
            poison_beyond(chain, live, value)

    chain.free_blocks.sort()  # the same blocks in another order
    got = [facts(live) for live in chain.run(wishes(), chunk=5, before_step=plant)]
    for one, other in zip(got, clean, strict=True):
        check_same(one, other, batch_invariant, kv_dtype)


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["fast", "invariant"])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("kv_dtype", TOLERANCE)
def test_a_broken_sequence_ends_alone(
    batch_invariant: bool, value: float, kv_dtype: str, tmp_path: Path
) -> None:
    """One sequence's own past is broken in mid-generation; its neighbours' bits stay."""
    model = MODELS[0]
    tiny_model(model, tmp_path)
    chain = Chain(
        tmp_path / model.name,
        3,
        batch_invariant=batch_invariant,
        num_blocks=64,
        kv_dtype=kv_dtype,
    )
    clean = [facts(live) for live in chain.run(wishes(), chunk=5)]

    def plant(alive: list[Live]) -> None:
        victim = next((live for live in alive if live.wish.prompt == wishes()[2].prompt), None)
        if victim is not None and len(victim.sampled) == 4:
            poison(chain, [victim.blocks[0]], value)

    lives = chain.run(wishes(), chunk=5, before_step=plant)
    assert lives[2].error == NOT_FINITE
    assert len(lives[2].sampled) == 4
    for i in (0, 1, 3):
        check_same(facts(lives[i]), clean[i], batch_invariant, kv_dtype)
    # The blocks of the broken one are used again, with what it left in them.
    chain.free_blocks.sort(key=lambda block: block not in lives[2].blocks, reverse=True)
    again = [facts(live) for live in chain.run(wishes(), chunk=5)]
    for one, other in zip(again, clean, strict=True):
        check_same(one, other, batch_invariant, kv_dtype)


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
