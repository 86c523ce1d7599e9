"""Which part of each weight a rank has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stage_worker.layout import all_parts, part_weights
from stage_worker.options import WorkerOptions
from stage_worker.sharding import SPLITS, Shards, Split, check_divides
from stagemesh.cli.stage_ranks import layers_by_ranks, ranks_of_stages
from stagemesh.errors import ConfigError, SpanError, UnsupportedModel
from stagemesh.model_spec import ModelSpec, parse_config
from stagemesh.plan import Span


def spec(**changes: object) -> ModelSpec:
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 321,
        "max_position_embeddings": 128,
        "attention_bias": True,
        **changes,
    }
    return parse_config(config, {})


def pieces(model: ModelSpec, name: str, shape: tuple[int, ...], size: int) -> list[torch.Tensor]:
    """The numbers of places that each rank has."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    found = []
    for rank in range(size):
        part = Shards(model, rank, size).part(name, shape)
        if part is not None:
            rows = whole[part.rows]
            found.append(rows if len(shape) == 1 else rows[:, part.columns])
    return found


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("family", ["Qwen3", "Olmo2"])
def test_ranks_have_every_place_of_a_weight_together(family: str, size: int) -> None:
    model = spec(architectures=[f"{family}ForCausalLM"])
    for part in all_parts(model):
        for name, shape in part_weights(model, part).items():
            parts = pieces(model, name, shape, size)
            everything = torch.cat([piece.flatten() for piece in parts])
            assert sorted(set(everything.tolist())) == list(range(torch.Size(shape).numel()))
            split = SPLITS[name.split(".")[-2]]
            if split in (Split.OUTPUTS, Split.VOCABULARY) or (
                split is Split.INPUTS and len(shape) == 2
            ):
                assert len(everything) == torch.Size(shape).numel(), "once"
            if split is Split.INPUTS and len(shape) == 1:
                assert len(parts) == 1, "a bias is added once"


def test_kv_heads_are_those_of_the_ranks_query_heads() -> None:
    model = spec()
    for size in (1, 2, 4, 8):
        for rank in range(size):
            shards = Shards(model, rank, size)
            local = shards.local_spec
            for head in range(local.num_heads):
                whole_head = rank * local.num_heads + head
                theirs = whole_head // (model.num_heads // model.num_kv_heads)
                group = head // (local.num_heads // local.num_kv_heads)
                assert shards.kv_heads[group] == theirs


def test_norms_over_all_heads_go_with_the_heads() -> None:
    model = spec(architectures=["Olmo2ForCausalLM"])
    queries, keys = (
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.self_attn.k_norm.weight",
    )
    for name, shape, projection in ((queries, (128,), "q_proj"), (keys, (32,), "k_proj")):
        norms = pieces(model, name, shape, 4)
        matrices = pieces(model, f"model.layers.1.self_attn.{projection}.weight", (*shape, 1), 4)
        for norm, matrix in zip(norms, matrices, strict=True):
            assert norm.tolist() == matrix.flatten().tolist()


@pytest.mark.parametrize(
    ("changes", "size", "told"),
    [
        ({}, 3, "--tensor-parallel 3: query heads 8"),
        ({"intermediate_size": 97}, 2, "--tensor-parallel 2: intermediate_size 97"),
        (
            {"num_attention_heads": 24, "num_key_value_heads": 6, "intermediate_size": 96},
            4,
            "--tensor-parallel 4: KV heads 6",
        ),
    ],
)
def test_counts_that_do_not_divide(changes: dict[str, int], size: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_divides(spec(**changes), size)


def test_what_the_table_does_not_know_is_refused() -> None:
    shards = Shards(spec(), 0, 2)
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.mlp\.chooser\.weight"):
        shards.part("model.layers.0.mlp.chooser.weight", (4, 64))
    with pytest.raises(UnsupportedModel, match="q_norm"):  # a family that has one for each head
        shards.part("model.layers.0.self_attn.q_norm.weight", (128,))
    assert replace(shards, size=1).part("anything.at.all", (4, 64)) is not None


def test_ranks_of_stages() -> None:
    assert ranks_of_stages((), 3) == (1, 1, 1)
    assert ranks_of_stages(("2",), 3) == (2, 2, 2)
    assert ranks_of_stages(("2", "1", "4"), 3) == (2, 1, 4)
    with pytest.raises(ConfigError, match="2 numbers for 3 stages"):
        ranks_of_stages(("2", "1"), 3)
    with pytest.raises(ConfigError, match="from 1 on"):
        ranks_of_stages(("x",), 3)


def test_layers_are_shared_out_by_ranks() -> None:
    assert layers_by_ranks((2, 1, 1), 8) == (Span(0, 4), Span(4, 6), Span(6, 8))
    assert layers_by_ranks((8, 1, 1), 3) == (Span(0, 1), Span(1, 2), Span(2, 3))
    with pytest.raises(SpanError, match="too many"):
        layers_by_ranks((1, 1, 1), 2)


def test_ranks_on_a_gpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="--tensor-parallel 2 needs --device cpu"):
        WorkerOptions(model=Path("x"), device="cuda", tensor_parallel=2)
