"""Mixtures of experts: whatever the router does, tokens are right, and what it did is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import add_tokenizer, tiny_model
from support.mesh import greedy_request, running_mesh
from support.mixtures import (
    MIXTURE,
    NUM_TOKENS,
    greedy_after,
    greedy_tokens,
    sampled,
    skewed_model,
    wishes,
)
from support.stages import Chain
from support.thread_ranks import ranked_chain
from support.waiting import wait_until

from stage_worker import fbgemm
from stage_worker.quantise_checkpoint import quantise_checkpoint
from stage_worker.sharding import check_divides
from stagemesh.errors import ConfigError
from stagemesh.model_spec import ModelSpec
from stagemesh.quantization import parse_quantization


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp("experts")
    return tiny_model(MIXTURE, directory), directory / MIXTURE.name


def test_32_at_once(checkpoint: tuple[Any, Path]) -> None:
    reference, path = checkpoint
    chain = Chain(path, 3, num_blocks=512)
    for live in chain.run(wishes(32), max_rows=32):
        assert sampled(live) == greedy_tokens(reference, live)
    routing = {layer: n for stage in chain.stages for layer, n in stage.experts.routing().items()}
    assert sorted(routing) == [0, 2, 3, 4]  # layer 1 has none
    num_tokens = sum(len(wish.prompt) + NUM_TOKENS - 1 for wish in wishes(32))
    for counts in routing.values():
        assert len(counts) == 6
        assert sum(counts) == 2 * num_tokens
        assert all(counts)


def test_all_tokens_to_two_experts(tmp_path: Path) -> None:
    """Skew costs balance and nothing else."""
    reference, path = skewed_model(tmp_path)
    chain = Chain(path, 2, num_blocks=512)
    for live in chain.run(wishes(8), max_rows=8):
        assert sampled(live) == greedy_tokens(reference, live)
    for stage in chain.stages:
        for counts in stage.experts.routing().values():
            assert [expert for expert, tokens in enumerate(counts) if tokens] == [1, 2]


@pytest.mark.parametrize("sizes", [(4,), (2, 1)])
def test_experts_spread_over_ranks(sizes: tuple[int, ...], checkpoint: tuple[Any, Path]) -> None:
    """6 experts on 4 ranks: two have 2, and two have 1."""
    reference, path = checkpoint
    with ranked_chain(path, sizes, expert_parallel=True) as chain:
        for live in chain.run(wishes(6), chunk=7, max_rows=4):
            assert sampled(live) == greedy_tokens(reference, live)
        weights = [rank.facts.weight_bytes for rank in chain.stages[0].ranks]
    assert weights == sorted(weights, reverse=True)
    assert (weights[0] > weights[-1]) == (sizes == (4,))


def test_too_few_experts_for_the_ranks(checkpoint: tuple[Any, Path]) -> None:
    spec = ModelSpec.from_directory(checkpoint[1])
    check_divides(spec, 4, whole_experts=True)
    with pytest.raises(ConfigError, match="--expert-parallel: 6 experts are too few for 8 ranks"):
        check_divides(spec, 8, whole_experts=True)


@pytest.mark.skipif(not fbgemm.is_available(), reason="needs AVX2")
@pytest.mark.parametrize("scheme", ["int8", "int4-g32"])
def test_stored_quantised(scheme: str, checkpoint: tuple[Any, Path], tmp_path: Path) -> None:
    """Files that `stagemesh quantize` wrote give what quantising at load does, router and all."""
    _, path = checkpoint
    quantise_checkpoint(path, tmp_path / "out", parse_quantization(scheme))
    (at_load,) = Chain(path, 1, quantization=scheme).run(wishes(1))
    (stored,) = Chain(tmp_path / "out", 1, quantization="auto").run(wishes(1))
    (exact,) = Chain(path, 1, quantization="none").run(wishes(1))
    assert sampled(stored) == sampled(at_load)
    assert stored.sampled[0].logprob != exact.sampled[0].logprob


def test_counts_come_to_status_and_metrics(checkpoint: tuple[Any, Path]) -> None:
    reference, path = checkpoint
    add_tokenizer(path)
    # Two stages of two ranks, each with half of the experts.
    with running_mesh(path, "--tensor-parallel", "2", "--expert-parallel", stages=2) as mesh:
        prompt = wishes(1)[0].prompt
        output = mesh.generate(greedy_request(prompt, NUM_TOKENS, ignore_eos=True))

        def counts() -> dict[int, int]:
            return {
                layer.layer: sum(layer.tokens)
                for worker in mesh.status().workers
                for layer in worker.stats.routing
            }

        wanted = dict.fromkeys([0, 2, 3, 4], 2 * (len(prompt) + NUM_TOKENS - 1))
        wait_until(lambda: counts() == wanted, 10.0, "heartbeats with the counts")
    assert output.token_ids == greedy_after(reference, prompt, output.token_ids)
