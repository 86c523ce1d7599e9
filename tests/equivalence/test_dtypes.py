"""bfloat16 and float16 follow float32 as closely as their precision allows; cuda follows cpu."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import SIZES, TinyModel, prompts, tiny_model
from support.stages import Chain, Wish

from stage_worker.loading import resolve_dtype

MODELS = [
    TinyModel("llama", "LlamaConfig", {"tie_word_embeddings": True}),
    TinyModel("mistral", "MistralConfig", {"sliding_window": 9}),
    TinyModel("qwen3", "Qwen3Config", {"head_dim": 16}),
]
# Those that the decoder of CUDA devices does not know.
MORE = [
    TinyModel("gemma3", "Gemma3TextConfig", {"head_dim": 16, "sliding_window": 9}),
    TinyModel(
        "gpt-oss",
        "GptOssConfig",
        {"num_local_experts": 4, "head_dim": 16, "sliding_window": 9, "pad_token_id": 0},
    ),
    TinyModel("olmo2", "Olmo2Config", {"pad_token_id": 0}),
]
# Mean difference of log-probabilities of the same tokens, at logits of standard deviation 1.5.
TOLERANCE = {"bfloat16": 0.1, "float16": 0.015, "float32": 1e-4}


def prompt_logprobs(chain: Chain) -> torch.Tensor:
    """Of fixed tokens, so that no early difference sends texts apart."""
    some = prompts(4, (40, 22, 7, 63), SIZES["vocab_size"], 2)
    lives = chain.run([Wish(prompt, 1, prompt_logprobs=True) for prompt in some], chunk=16)
    assert all(live.error is None for live in lives)
    return torch.tensor([token.logprob for live in lives for token in live.prompt_logprobs])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model", MODELS + MORE, ids=str)
def test_half_precision_is_near(model: TinyModel, dtype: str, tmp_path: Path) -> None:
    tiny_model(model, tmp_path)
    exact = prompt_logprobs(Chain(tmp_path / model.name, 1))
    chain = Chain(tmp_path / model.name, 3, dtype=dtype)
    assert {stage.dtype for stage in chain.stages} == {dtype}
    difference = float((prompt_logprobs(chain) - exact).abs().mean())
    assert 0 < difference < TOLERANCE[dtype]


def test_auto_is_float32_on_a_cpu(tmp_path: Path) -> None:
    tiny_model(MODELS[0], tmp_path)
    path = tmp_path / MODELS[0].name
    config = path / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    (stage,) = Chain(path, 1, dtype="auto").stages
    assert stage.dtype == "float32"
    assert resolve_dtype("auto", stage.spec, torch.device("cuda")) == "bfloat16"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_cuda_is_near(model: TinyModel, dtype: str, tmp_path: Path) -> None:
    tiny_model(model, tmp_path)
    exact = prompt_logprobs(Chain(tmp_path / model.name, 1))
    got = prompt_logprobs(Chain(tmp_path / model.name, 2, dtype=dtype, device="cuda"))
    assert float((got - exact).abs().mean()) < TOLERANCE[dtype]
