"""Damaged, incomplete and foreign checkpoints are refused by name; parts are hashed as they are."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import TinyModel, tiny_model
from support.measure_stage_memory import anonymous_bytes

from stage_worker import devices
from stage_worker.executor import ExecutorConfig, StageExecutor
from stage_worker.identity import CACHE_NAME, summarise
from stagemesh.errors import (
    CheckpointError,
    ConfigError,
    OutOfMemory,
    SpanError,
    UnsupportedModel,
)
from stagemesh.plan import Span

SHARDED = TinyModel("sharded", "LlamaConfig", shard_size="60KB")
SINGLE = TinyModel("single", "LlamaConfig", {"tie_word_embeddings": True})


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("originals")
    for model in (SHARDED, SINGLE):
        tiny_model(model, directory)
    return directory


@pytest.fixture
def sharded(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "sharded", tmp_path / "sharded"))


@pytest.fixture
def single(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "single", tmp_path / "single"))


WHOLE = Span(0, 5)


def load(path: Path, span: Span = WHOLE, **options: Any) -> StageExecutor:
    config = {
        "device": "cpu",
        "dtype": "auto",
        "batch_invariant": False,
        "block_size_tokens": 8,
        "num_blocks": 4,
    }
    return StageExecutor.load(
        ExecutorConfig(model_dir=path, span=span, **{**config, **options}), lambda *_: None
    )


def shard_of(path: Path, tensor: str) -> Path:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    return path / index["weight_map"][tensor]


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_missing_shard_is_named_by_those_who_need_it(sharded: Path) -> None:
    missing = shard_of(sharded, "model.layers.4.mlp.down_proj.weight")
    missing.unlink()
    with pytest.raises(CheckpointError, match=f"{missing.name} is missing"):
        load(sharded, Span(3, 5))
    assert load(sharded, Span(0, 2)).facts.weight_bytes > 0


def test_a_cut_off_file_is_damaged(single: Path) -> None:
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut off"):
        load(single)
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        summarise(single)


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 64, b"not a tensor file at all"])
def test_garbage_is_damaged(single: Path, content: bytes) -> None:
    (single / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        load(single)


def test_a_damaged_index_is_named(sharded: Path) -> None:
    for content in ("{", "[]", '{"weight_map": 3}'):
        (sharded / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
            load(sharded)


def test_a_missing_tensor_is_named(single: Path, sharded: Path) -> None:
    tensors = load_file(single / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, single / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.2\.mlp\.up_proj"):
        load(single)
    assert load(single, Span(3, 5)).spec.num_layers == 5
    edit_config(sharded, num_hidden_layers=6)
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.5"):
        load(sharded, Span(0, 6))


def test_a_wrong_shape_is_named(single: Path) -> None:
    edit_config(single, intermediate_size=90)
    with pytest.raises(CheckpointError, match=r"has shape \[\d+, \d+\], config\.json says"):
        load(single)


def test_an_unsupported_dtype_is_named(single: Path) -> None:
    tensors = load_file(single / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, single / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"model\.norm\.weight is stored as F8_E4M3"):
        load(single)


@pytest.mark.parametrize("span", [Span(0, 6), Span(5, 6), Span(2, 2), Span(3, 1), Span(-1, 2)])
def test_a_span_outside_of_the_model_is_refused(originals: Path, span: Span) -> None:
    with pytest.raises(SpanError, match="has 5 layers"):
        load(originals / "single", span)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": "bfloat16", "batch_invariant": True}, "batch_invariant"),
        ({"block_size_tokens": 0}, "block_size"),
        ({"kv_dtype": "int4"}, "--kv-dtype must be"),
    ],
)
def test_wrong_options_are_named(originals: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(originals / "single", **options)


def test_memory_that_is_not_there(originals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = originals / "single"
    with pytest.raises(OutOfMemory, match="max_kv_memory"):
        load(path, num_blocks=None, max_kv_memory_bytes=100)
    monkeypatch.setattr(devices, "available_bytes", lambda device: 1000)
    with pytest.raises(OutOfMemory, match="weights take"):
        load(path)


def test_blocks_follow_from_the_budget(originals: Path) -> None:
    budget = 100_000
    facts = load(originals / "single", num_blocks=None, max_kv_memory_bytes=budget).facts
    assert facts.kv_block_bytes == 2 * 5 * 8 * 2 * 16 * 4
    assert facts.num_blocks == budget // facts.kv_block_bytes
    int8 = load(
        originals / "single", num_blocks=None, max_kv_memory_bytes=budget, kv_dtype="int8"
    ).facts
    assert int8.kv_block_bytes == 2 * 5 * 8 * 2 * (16 + 4)
    assert int8.num_blocks == budget // int8.kv_block_bytes >= 3 * facts.num_blocks
    default = load(originals / "single", num_blocks=None).facts
    assert default.num_blocks == 256 * 128 // 8  # 256 sequences of full length are enough


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_blocks_that_are_not_used_take_no_memory(originals: Path) -> None:
    before = anonymous_bytes()
    facts = load(originals / "single", num_blocks=60_000).facts
    assert facts.num_blocks * facts.kv_block_bytes > 5e8
    assert anonymous_bytes() - before < 5e7


def test_a_stage_loads_only_what_its_span_has(originals: Path) -> None:
    tensors = load_file(originals / "single" / "model.safetensors")
    total = sum(tensor.nbytes for tensor in tensors.values())
    embedding = tensors["model.embed_tokens.weight"].nbytes
    assert load(originals / "single").facts.weight_bytes == total
    stages = [load(originals / "single", span) for span in (Span(0, 2), Span(2, 4), Span(4, 5))]
    assert sum(stage.facts.weight_bytes for stage in stages) == total + embedding


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_progress_is_told_and_ends_at_the_total(originals: Path, batch_invariant: bool) -> None:
    seen: list[tuple[int, int]] = []
    config = ExecutorConfig(
        originals / "sharded", WHOLE, "cpu", "float32", batch_invariant, 8, None, 4
    )
    facts = StageExecutor.load(config, lambda *told: seen.append(told)).facts
    assert seen == sorted(seen)
    assert seen[-1] == (facts.weight_bytes, facts.weight_bytes)


def test_summary_and_part_hashes(single: Path) -> None:
    summary = summarise(single)
    parts = ["embedding", *(f"layer.{i}" for i in range(5)), "norm", "head"]
    assert list(summary.part_hashes) == parts
    assert len(set(summary.part_hashes.values())) == len(parts) - 1  # head and embedding are one
    assert (summary.name, summary.num_layers, summary.max_position) == ("single", 5, 128)
    assert (single / CACHE_NAME).exists()
    assert summarise(single) == summary
    tensors = load_file(single / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] += 1.0
    save_file(tensors, single / "model.safetensors")
    changed = summarise(single)
    assert changed.structure_hash == summary.structure_hash
    assert {part for part in parts if changed.part_hashes[part] != summary.part_hashes[part]} == {
        "layer.3"
    }


def test_sharded_and_single_files_of_one_model_are_the_same(sharded: Path, tmp_path: Path) -> None:
    whole: dict[str, torch.Tensor] = {}
    for file in sharded.glob("*.safetensors"):
        whole.update(load_file(file))
    joined = tmp_path / "joined"
    joined.mkdir()
    shutil.copy(sharded / "config.json", joined)
    save_file(whole, joined / "model.safetensors")
    one, other = summarise(sharded), summarise(joined)
    assert one.part_hashes == other.part_hashes
    assert one.structure_hash == other.structure_hash


def test_parts_without_their_files_have_no_hash(sharded: Path) -> None:
    before = summarise(sharded)
    shard_of(sharded, "lm_head.weight").unlink()
    after = summarise(sharded)
    assert "head" not in after.part_hashes
    assert set(after.part_hashes.items()) < set(before.part_hashes.items())
    assert after.structure_hash == before.structure_hash
    for file in sharded.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="files are missing"):
        summarise(sharded)


def test_the_cache_is_used_while_files_are_the_same_and_no_longer(single: Path) -> None:
    first = summarise(single)
    cache = json.loads((single / CACHE_NAME).read_text())
    cache["parts"]["norm"]["hash"] = "remembered"
    (single / CACHE_NAME).write_text(json.dumps(cache))
    assert summarise(single).part_hashes["norm"] == "remembered"
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes())  # new modification time
    assert summarise(single) == first
    for damaged in ("{", "[]", '{"version": 1, "parts": {"norm": {}}}'):
        (single / CACHE_NAME).write_text(damaged)
        assert summarise(single) == first
