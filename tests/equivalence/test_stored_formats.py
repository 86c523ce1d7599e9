"""Checkpoints that come quantised give what their weights, turned into floats elsewhere, give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import SIZES, TinyModel, prompts, tiny_model
from support.paths import DEMO_MODEL
from support.stages import Chain, Wish
from support.stored_formats import FORMATS, write_stored

from stage_worker import fbgemm
from stage_worker.identity import summarise
from stage_worker.quantise_checkpoint import quantise_checkpoint
from stagemesh.errors import CheckpointError, ConfigError, UnsupportedModel
from stagemesh.model_spec import ModelSpec
from stagemesh.quantization import parse_quantization

MODEL = TinyModel("plain", "Qwen2Config", {"intermediate_size": 96, "tie_word_embeddings": True})
# Mean difference of log-probabilities: what rounding activations (and scales, for int4) makes.
AUTO_TOLERANCE = 0.2


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stored")
    tiny_model(MODEL, directory)
    return directory / MODEL.name


def logprobs(path: Path, quantization: str, num_stages: int = 2) -> torch.Tensor:
    some = prompts(3, (40, 22, 7), SIZES["vocab_size"], 2)
    chain = Chain(path, num_stages, quantization=quantization)
    lives = chain.run([Wish(prompt, 1, prompt_logprobs=True) for prompt in some])
    return torch.tensor([token.logprob for live in lives for token in live.prompt_logprobs])


@pytest.mark.parametrize("name", FORMATS)
def test_foreign_formats(name: str, plain: Path, tmp_path: Path) -> None:
    stored = tmp_path / name
    expected = logprobs(write_stored(plain, stored, name), "none")
    assert torch.equal(logprobs(stored, "none"), expected)
    held = logprobs(stored, "auto")
    assert float((held - expected).abs().mean()) < AUTO_TOLERANCE
    is_float = name.startswith(("fp8", "gptq-act-order", "gptq-8"))
    assert torch.equal(held, expected) == is_float, "held as codes where a kernel takes them"
    summary = summarise(stored)
    assert set(summary.part_hashes) == set(summarise(plain).part_hashes)
    assert summary.structure_hash != summarise(plain).structure_hash


@pytest.mark.skipif(not fbgemm.is_available(), reason="needs AVX2")
@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "int4-g64,head=none,1:3=int8,3:4=none"])
def test_a_stored_model_computes_what_the_original_does_quantised(
    scheme: str, tmp_path: Path
) -> None:
    """To the last bit; what is not quantised is stored as floats of 16 bits and held so."""
    parts: list[str] = []
    out = tmp_path / "out"
    num_bytes = quantise_checkpoint(DEMO_MODEL, out, parse_quantization(scheme), parts.append)
    assert parts[0] == "embedding"
    assert num_bytes == sum(
        tensor.nbytes for file in out.glob("*.safetensors") for tensor in load_file(file).values()
    )
    assert torch.equal(logprobs(out, "auto"), logprobs(DEMO_MODEL, scheme.replace("none", "auto")))
    assert (out / "tokenizer.json").read_bytes() == (DEMO_MODEL / "tokenizer.json").read_bytes()


def test_what_cannot_be_quantised_is_refused(plain: Path, tmp_path: Path) -> None:
    for scheme in ("auto", "none"):
        with pytest.raises(ConfigError, match="int8 or int4"):
            quantise_checkpoint(plain, tmp_path / "x", parse_quantization(scheme))
    with pytest.raises(ConfigError, match="not empty"):
        quantise_checkpoint(plain, plain, parse_quantization("int8"))
    write_stored(plain, tmp_path / "awq", "awq")
    with pytest.raises(CheckpointError, match="quantised already"):
        quantise_checkpoint(tmp_path / "awq", tmp_path / "y", parse_quantization("int8"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gptq", {"bits": 3}, "bits 3"),
        ("awq", {"version": "gemv"}, "version 'gemv'"),
        ("awq", {"quant_method": "hqq"}, "quant_method 'hqq'"),
        ("int-quantized", {"format": "marlin-24"}, "format 'marlin-24'"),
        ("fp8-blocks", {"weight_block_size": None}, "weight_block_size"),
    ],
)
def test_what_is_not_understood_is_named(
    name: str, changes: dict[str, object], message: str, plain: Path, tmp_path: Path
) -> None:
    write_stored(plain, tmp_path / "it", name)
    path = tmp_path / "it" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=message):
        ModelSpec.from_directory(tmp_path / "it")


def test_a_damaged_config_and_a_missing_tensor_are_named(plain: Path, tmp_path: Path) -> None:
    write_stored(plain, tmp_path / "it", "awq")
    path = tmp_path / "it" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["group_size"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantization_config is damaged"):
        ModelSpec.from_directory(tmp_path / "it")
    config["quantization_config"] = FORMATS["gptq"][1]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"qweight|g_idx"):
        Chain(tmp_path / "it")
