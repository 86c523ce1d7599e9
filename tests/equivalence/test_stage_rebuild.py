"""Stages that were lost are rebuilt bit by bit: from tokens, from the log of what was sent to them,
or by computing again as much of the stages before as the log lacks, while other sequences go on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import SIZES, TinyModel, prompts, rope, tiny_model
from support.rebuilding import Rebuilder
from support.stages import Chain, Live, Wish

from stage_worker.executor import StageExecutor
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import Row
from stagemesh.sampling import SamplingSpec

NUM_TOKENS = 10
BLOCK_SIZE = 8
SEEDED = SamplingSpec(temperature=0.8, seed=5, top_p=0.95, num_logprobs=3, repetition_penalty=1.2)
MODELS = {
    model.name: model
    for model in (
        TinyModel("llama", "LlamaConfig", {"attention_bias": True, "tie_word_embeddings": True}),
        TinyModel("mistral", "MistralConfig", {"sliding_window": 20}),
        TinyModel("qwen3", "Qwen3Config", {"head_dim": 16, **rope("dynamic", factor=2.0)}),
        TinyModel("qwen2", "Qwen2Config", {"hidden_size": 72, "intermediate_size": 172}),
    )
}


def wishes() -> list[Wish]:
    lengths = (70, 5, 33, 1, 16)
    return [
        Wish(prompt, NUM_TOKENS, SEEDED, prompt_logprobs=True)
        for prompt in prompts(5, lengths, SIZES["vocab_size"], 3)
    ]


Made = tuple[Path, list[tuple[object, ...]]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A checkpoint, made when it is first asked for, and what all wishes give undisturbed."""
    directory = tmp_path_factory.mktemp("models")

    @functools.cache
    def made(name: str) -> Made:
        tiny_model(MODELS[name], directory)
        chain = Chain(directory / name, 1, batch_invariant=True)
        return directory / name, [_facts(live) for live in chain.run(wishes())]

    return made


def _facts(live: Live) -> tuple[object, ...]:
    return live.sampled, live.prompt_logprobs


CASES = {
    "first": ([0], None),
    "middle, from its log": ([1], None),
    "last, from its log": ([3], None),
    "last, from tokens": ([3], 0),
    "middle, log for some blocks": ([2], 12),
    "last, log for some blocks": ([3], 12),
    "neighbours": ([1, 2], None),
    "neighbours, log for some blocks": ([2, 3], 12),
    "all but the last": ([0, 1, 2], None),
}
ALL_WAYS = "neighbours, log for some blocks"
RUNS = [("llama", case) for case in CASES] + [(name, ALL_WAYS) for name in list(MODELS)[1:]]


@pytest.mark.parametrize(("name", "case"), RUNS)
def test_lost_stages_are_rebuilt_bit_by_bit(
    make: Callable[[str], Made], name: str, case: str
) -> None:
    model, expected = make(name)
    _lose_and_rebuild(model, case, "auto", expected)


@pytest.mark.parametrize("case", ["middle, from its log", ALL_WAYS])
def test_what_is_rounded_on_the_wire_is_rounded_alike_when_it_is_rebuilt(
    make: Callable[[str], Made], case: str
) -> None:
    model, exact = make("llama")
    expected = [_facts(live) for live in _chain(model, None, "int8").run(wishes())]
    assert expected != exact
    _lose_and_rebuild(model, case, "int8", expected)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_what_is_rounded_in_the_pages_is_rounded_alike_when_it_is_rebuilt(
    make: Callable[[str], Made], name: str, kv_dtype: str
) -> None:
    """As many stages, chunks and rows in a step as there may be: one has given the same."""
    model, exact = make(name)
    alone = Chain(model, 1, batch_invariant=True, kv_dtype=kv_dtype)
    expected = [_facts(live) for live in alone.run(wishes(), max_rows=1)]
    assert expected != exact
    _lose_and_rebuild(model, ALL_WAYS, "auto", expected, kv_dtype)


def _lose_and_rebuild(
    model: Path,
    case: str,
    wire_dtype: str,
    expected: list[tuple[object, ...]],
    kv_dtype: str = "auto",
) -> None:
    lost, num_logged = CASES[case]
    chain = _chain(model, num_logged, wire_dtype, kv_dtype)
    lives = [chain.start(wish) for wish in wishes()]
    before = Rebuilder(chain, chunk=9, lost=[], use_log=True, alive=list(lives))
    for _ in range(9):
        before.step(num_rows=3)
    assert any(live.computed < len(live.wish.prompt) for live in lives), "one is in its prompt"
    assert any(len(live.tokens) > len(live.wish.prompt) for live in lives), "one decodes"
    computed = [live.computed for live in lives]
    gone = chain.lose(lost)
    after = Rebuilder(chain, chunk=11, lost=lost, use_log=num_logged != 0, alive=before.alive)
    while after.alive:
        after.step(num_rows=2)
    assert [_facts(live) for live in lives] == expected
    for old, stage in zip(gone, lost, strict=True):
        for live, count in zip(lives, computed, strict=True):
            slots = _slots(live, count)
            pages = zip(_pages(old, slots), _pages(chain.stages[stage], slots), strict=True)
            assert all(torch.equal(one, other) for one, other in pages)


def _chain(
    model: Path, num_logged: int | None, wire_dtype: str = "auto", kv_dtype: str = "auto"
) -> Chain:
    """Blocks are handed out in no order, so that a log for some of them has holes everywhere."""
    block_bytes = ModelSpec.from_directory(model).hidden_size * BLOCK_SIZE * 4
    num_bytes = None if num_logged is None else num_logged * block_bytes
    chain = Chain(
        model,
        4,
        batch_invariant=True,
        block_size_tokens=BLOCK_SIZE,
        num_blocks=32,
        max_log_memory_bytes=num_bytes,
        wire_dtype=wire_dtype,
        kv_dtype=kv_dtype,
    )
    expected = 32 if num_logged is None else num_logged
    assert [stage.log.num_blocks for stage in chain.stages] == [expected] * 3 + [0]
    return chain


def _slots(live: Live, count: int) -> torch.Tensor:
    blocks = torch.tensor(live.blocks)
    return (blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:count]


def _pages(stage: StageExecutor, slots: torch.Tensor) -> Iterator[torch.Tensor]:
    """What a stage holds at these slots: KV of each layer, and what it logged."""
    for pages in stage.cache.memory:
        yield pages.flatten(0, 1)[slots]
    if stage.log.num_blocks:
        yield stage.log.read(slots[slots < stage.log.num_blocks * BLOCK_SIZE])


def test_rows_that_only_recompute_leave_the_pages_alone(make: Callable[[str], Made]) -> None:
    """A page that the plan says is valid is not written, though other bits would come out of it."""
    model, _ = make("llama")
    chain = _chain(model, None)
    (live,) = [chain.start(wish) for wish in wishes()[:1]]
    row = live.row(4, None)
    live.take(row, chain.execute([row])[0])
    slots = _slots(live, live.computed)
    keys = chain.stages[0].cache.memory[0].flatten(0, 1)
    with torch.inference_mode():
        keys[slots] += 1.0
    marked, log = keys[slots].clone(), chain.stages[0].log.read(slots).clone()
    recompute: Callable[[int], Row] = lambda writing: live.rebuild_row(0, 20, range(2), writing)  # noqa: E731
    chain.execute([recompute(1)])
    assert torch.equal(keys[slots], marked)
    assert not torch.equal(chain.stages[0].log.read(slots)[:20], log[:20]), "it read the pages"
    chain.execute([recompute(0)])
    assert torch.equal(chain.stages[0].log.read(slots), log)
    assert not torch.equal(keys[slots][:20], marked[:20])
    assert torch.equal(keys[slots][20:], marked[20:])
