"""Mixtures of experts: whatever the router does, tokens are right, and what it did is counted."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import SIZES, TinyModel, prompts, reference_logprobs, tiny_model
from support.mesh import greedy_request, running_mesh
from support.paths import DEMO_MODEL
from support.stages import Chain, Wish
from support.thread_ranks import ranked_chain
from support.waiting import wait_until

from stage_worker import fbgemm
from stage_worker.expert_placement import place
from stage_worker.quantise_checkpoint import quantise_checkpoint
from stage_worker.sharding import check_divides
from stagemesh.errors import ConfigError
from stagemesh.model_spec import ModelSpec
from stagemesh.quantization import parse_quantization

MODEL = TinyModel(
    "experts",
    "Qwen3MoeConfig",
    {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
        "head_dim": 16,
    },
    3,
)
NUM_TOKENS = 12


def wishes(num: int) -> list[Wish]:
    return [Wish(p, NUM_TOKENS) for p in prompts(num, (5, 19, 40), SIZES["vocab_size"], 1)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp("experts")
    return tiny_model(MODEL, directory), directory / MODEL.name


def greedy_tokens(reference: Any, live: Any) -> list[int]:
    after_prompt = reference_logprobs(reference, live.tokens)[len(live.wish.prompt) - 1 : -1]
    return list(after_prompt.argmax(dim=-1).tolist())


def sampled(live: Any) -> list[int]:
    return [token.token_id for token in live.sampled]


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


def skewed_model(directory: Path) -> tuple[Any, Path]:
    """All tokens go to experts 1 and 2 of every layer."""
    skewed = replace(MODEL, config={**MODEL.config, "num_experts_per_tok": 1})
    reference = tiny_model(skewed, directory)
    with torch.no_grad():
        for layer in reference.model.layers:
            if hasattr(layer.mlp, "experts"):
                # One of the two scores is positive, whatever the token is, and all others are zero.
                scores = layer.mlp.gate.weight
                scores[[0, 3, 4, 5]] = 0.0
                scores[2] = -scores[1]
    reference.save_pretrained(directory / MODEL.name)
    return reference, directory / MODEL.name


def test_all_tokens_to_two_experts(tmp_path: Path) -> None:
    """Skew costs balance and nothing else."""
    reference, _ = skewed_model(tmp_path)
    chain = Chain(tmp_path / MODEL.name, 2, num_blocks=512)
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


def test_experts_that_move_while_requests_run(checkpoint: tuple[Any, Path]) -> None:
    """Another placement now and then: on other ranks, on several, and back."""
    reference, path = checkpoint
    counts = ([9, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 9], [0, 5, 0, 0, 7, 0], [1] * 6)
    placements = itertools.cycle(place(tokens, 4, 1) for tokens in counts)
    with ranked_chain(path, (4,), expert_parallel=True, redundant_experts=1) as chain:
        (stage,) = chain.stages
        execute, num_steps = stage.execute, itertools.count()

        def execute_and_place(*step: Any) -> Any:
            if next(num_steps) % 8 == 5:
                placement = next(placements)
                for rank in stage.ranks:
                    rank.experts.place(2, placement)
            return execute(*step)

        stage.execute = execute_and_place
        for live in chain.run(wishes(6), chunk=7, max_rows=4):
            assert sampled(live) == greedy_tokens(reference, live)
        assert next(num_steps) > 16


def test_busy_experts_come_to_be_on_several_ranks(tmp_path: Path) -> None:
    """Of processes: the mesh moves them by itself, and nobody notices."""
    path = skewed_model(tmp_path)[1]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((DEMO_MODEL / name).read_bytes())
    options = ("--tensor-parallel", "2", "--expert-parallel", "--redundant-experts", "1")
    requests = [greedy_request(wish.prompt, 40, ignore_eos=True) for wish in wishes(8)]
    with running_mesh(path, stages=1) as mesh:
        expected = [output.token_ids for output in mesh.generate_all(requests)]
    with running_mesh(path, *options, stages=1) as mesh:
        for _ in range(20):
            found = [output.token_ids for output in mesh.generate_all(requests)]
            assert found == expected
            if mesh.log.read_text().count("experts are placed anew") >= 2:
                break
        assert mesh.log.read_text().count("experts are placed anew") >= 2


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
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((DEMO_MODEL / name).read_bytes())
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
    logprobs = reference_logprobs(reference, [*prompt, *output.token_ids])
    assert output.token_ids == logprobs[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
