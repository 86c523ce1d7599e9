"""The parts of `benchmarks.peers` that need no peer: the checkpoint, the protocol, the ratios."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from benchmarks.peers.environments import PEERS, REQUIREMENTS
from benchmarks.peers.make_model import SIZES, make_model
from benchmarks.peers.protocol import Timing
from benchmarks.peers.side_by_side import Measured
from benchmarks.recovery.random_model import ModelShape
from stage_worker.checkpoint import Checkpoint
from stagemesh.model_spec import ModelSpec


def test_the_checkpoint_is_a_llama_that_we_serve(tmp_path: Path) -> None:
    make_model(tmp_path, SIZES["tiny"])
    spec = ModelSpec.from_directory(tmp_path)
    assert (spec.family, spec.vocab_size, spec.tie_embeddings) == ("llama", 4096, False)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 4096
    assert tokenizer.decode([4095]).strip() == "fill4095"
    assert max(tokenizer.encode("Once upon a time fill4095").ids) < 2048


def test_the_large_one_is_tinyllamas_shape() -> None:
    assert SIZES["1.1b"].num_parameters() == pytest.approx(1.1e9, rel=0.001)


def test_a_large_checkpoint_lies_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    make_model(whole, SIZES["tiny"])
    monkeypatch.setattr("benchmarks.recovery.random_model._MAX_SHARD_BYTES", 2**20)
    make_model(cut, SIZES["tiny"])
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    shards = {path.name for path in cut.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == shards
    assert len(shards) > 1
    one, other = Checkpoint(whole), Checkpoint(cut)
    for name in index["weight_map"]:
        shape = tuple(load_file(whole / "model.safetensors")[name].shape)
        assert torch.equal(one.view(name, shape), other.view(name, shape))


def test_every_peer_has_its_requirements_pinned() -> None:
    for peer in PEERS:
        lines = (REQUIREMENTS / f"{peer}.txt").read_text().splitlines()
        assert lines
        assert all("==" in line for line in lines), peer


def test_decoding_is_without_the_step_that_reads_the_prompts() -> None:
    timing = Timing.of_steps(8, [2.0, 2.5, 3.0])
    assert timing == Timing(prefill_s=2.0, decode_tokens=16, decode_s=1.0)
    assert Timing.of_steps(1, [2.0]) == Timing(2.0, 0, 0.0)


def test_a_ratio_is_of_runs_that_followed_one_another() -> None:
    # The machine was twice as slow in the second round, for both.
    measured = Measured("decode", peer=[10.0, 5.0, 10.0], ours=[11.0, 5.5, 13.0])
    assert measured.ratio == pytest.approx(1.1)


def test_kv_and_parameters_of_a_shape() -> None:
    tied = ModelShape(num_layers=1, hidden_size=64, intermediate_size=64, num_heads=4)
    untied = ModelShape(num_layers=1, hidden_size=64, intermediate_size=64, num_heads=4, tied=False)
    assert untied.num_parameters() - tied.num_parameters() == 2048 * 64
