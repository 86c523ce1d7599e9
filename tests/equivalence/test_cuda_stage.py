"""A stage on a CUDA device: its tokens are those of transformers, with graphs and without.

The same stage runs on a CPU where TRITON_INTERPRET=1, in Triton's interpreter and without graphs.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    SIZES,
    TinyModel,
    prompts,
    reference_logprobs,
    rope,
    tiny_model,
)
from support.stages import Chain, Live, Wish

import stage_worker.loading
from stagemesh.errors import ConfigError, OutOfMemory
from stagemesh.sampling import SamplingSpec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
NUM_TOKENS = 2 if INTERPRETED else 32
MODELS = [
    TinyModel("llama", "LlamaConfig", {"num_key_value_heads": 4}, 2),
    TinyModel("llama-head-dim", "LlamaConfig", {"head_dim": 24, "num_key_value_heads": 1}),
    TinyModel("llama-biases", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    TinyModel("llama-dynamic", "LlamaConfig", rope("dynamic", factor=4.0)),
    TinyModel("mistral-window", "MistralConfig", {"sliding_window": 11}),
    TinyModel("qwen2", "Qwen2Config", {"tie_word_embeddings": True}),
    TinyModel("qwen3", "Qwen3Config", {"head_dim": 32}, 4),
    TinyModel(
        "qwen3-layer-types-yarn",
        "Qwen3Config",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 10,
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
            **rope("yarn", factor=2.0, attention_factor=1.3, original_max_position_embeddings=64),
        },
        2,
    ),
]
# Log-probabilities of the same tokens, at logits of standard deviation 1.5: mean difference.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.06, "float16": 0.01}


@pytest.fixture(autouse=True)
def interpreted_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        from stage_worker.decoding import cuda_decoding

        monkeypatch.setattr(
            stage_worker.loading,
            "make_decoding",
            lambda spec, span, weights, cache, kernels, dtype, *_: cuda_decoding(
                spec, spec.layer_windows[span.start : span.end], weights, cache, dtype
            ),
        )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


def wishes(model: TinyModel) -> list[Wish]:
    return [Wish(p, NUM_TOKENS) for p in prompts(3, (5, 19, 40), SIZES["vocab_size"], model.seed)]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_greedy_tokens_are_those_of_transformers(model: TinyModel, directory: Path) -> None:
    """Teacher-forced, in float32, in chunks and whole, alone and together, in one stage and two."""
    reference = tiny_model(model, directory)
    ways = [(2, 3, 7)] if INTERPRETED else [(1, 1, None), (2, 3, 7), (1, 3, None)]
    for num_stages, max_rows, chunk in ways:
        chain = Chain(directory / model.name, num_stages, device=DEVICE)
        for live in chain.run(wishes(model), max_rows=max_rows, chunk=chunk):
            check_greedy(reference, live)


def check_greedy(reference: torch.nn.Module, live: Live) -> None:
    assert len(live.sampled) == NUM_TOKENS
    expected = reference_logprobs(reference, live.tokens)[len(live.wish.prompt) - 1 : -1]
    best = expected.max(dim=-1).values
    ids = torch.tensor([token.token_id for token in live.sampled])
    chosen = expected.gather(1, ids[:, None])[:, 0]
    logprobs = torch.tensor([token.logprob for token in live.sampled])
    assert float((logprobs - chosen).abs().max()) < 1e-4
    # The same token, or one that transformers holds for as likely to within the noise.
    assert float((best - chosen).max()) < 1e-4


@pytest.mark.parametrize("dtype", ["float32"] if INTERPRETED else ["float32", "bfloat16"])
def test_plain_greedy_rows_take_the_same_tokens(dtype: str, directory: Path) -> None:
    """Chosen on the device for the whole batch, and one by one where log-probabilities are told."""
    tiny_model(MODELS[0], directory)
    plain, told = SamplingSpec(temperature=0.0), SamplingSpec(temperature=0.0, num_logprobs=1)
    some = prompts(5, (5, 19, 40), SIZES["vocab_size"], 3)
    runs = []
    for spec in (plain, told):
        chain = Chain(directory / MODELS[0].name, 1, device=DEVICE, dtype=dtype)
        runs.append(chain.run([Wish(p, NUM_TOKENS, spec) for p in some]))
    assert [live.tokens for live in runs[0]] == [live.tokens for live in runs[1]]


@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model", [MODELS[0], MODELS[4], MODELS[6]], ids=str)
def test_half_precision_is_near(model: TinyModel, dtype: str, directory: Path) -> None:
    """Prefill and decode of the same tokens, compared with float32 on the CPU."""
    tiny_model(model, directory)
    exact, got = (
        _logprobs(Chain(directory / model.name, 2, dtype=kind, device=device))
        for kind, device in (("float32", "cpu"), (dtype, "cuda"))
    )
    assert float((got - exact).abs().mean()) < TOLERANCE[dtype]


def _logprobs(chain: Chain) -> torch.Tensor:
    """Of fixed prompts, in chunks of 16 and in chunks of one token: as decode rows."""
    some = prompts(4, (40, 22, 7, 63), SIZES["vocab_size"], 2)
    found = []
    for chunk in (16, 1):
        lives = chain.run([Wish(prompt, 1, prompt_logprobs=True) for prompt in some], chunk=chunk)
        assert all(live.error is None for live in lives)
        found += [token.logprob for live in lives for token in live.prompt_logprobs]
    return torch.tensor(found)


@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [MODELS[0], MODELS[7]], ids=str)
def test_graphs_change_no_bit(
    model: TinyModel, dtype: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stage_worker.cuda_graphs import DecodeGraphs

    tiny_model(model, directory)
    some = prompts(5, (5, 19, 40, 90, 33), SIZES["vocab_size"], 7)
    found = []
    for captures in (True, False):
        if not captures:
            monkeypatch.setattr(DecodeGraphs, "capture", lambda self: None)
        chain = Chain(directory / model.name, 2, dtype=dtype, device="cuda")
        # Fewer and fewer rows, so that graphs of several sizes run.
        lives = chain.run([Wish(p, 4 + 6 * i) for i, p in enumerate(some)])
        found.append([[(t.token_id, t.logprob) for t in live.sampled] for live in lives])
    assert found[0] == found[1]


@on_gpu
def test_numbers_that_are_not_finite_fail_their_row_only(directory: Path) -> None:
    tiny_model(MODELS[0], directory)
    spec = SamplingSpec(temperature=0.0)
    some = prompts(3, (5, 19, 40), SIZES["vocab_size"], 3)
    chain = Chain(directory / MODELS[0].name, 1, device="cuda")
    poisoned: list[int] = []

    def poison(alive: list[Live]) -> None:
        if alive and alive[0].computed > 8 and not poisoned:
            poisoned.append(alive[0].sequence_id)
            with torch.inference_mode():
                chain.stages[0].cache.values[0][list(alive[0].blocks)] = float("nan")

    lives = chain.run([Wish(p, 16, spec) for p in some], before_step=poison)
    assert poisoned
    assert [live.error is not None for live in lives] == [True, False, False]


@on_gpu
def test_devices_that_are_not_there_are_refused(directory: Path) -> None:
    tiny_model(MODELS[0], directory)
    for name in (f"cuda:{torch.cuda.device_count()}", "cuda:x"):
        with pytest.raises(ConfigError, match=name):
            Chain(directory / MODELS[0].name, 1, device=name)


@on_gpu
def test_more_kv_than_the_device_has_is_out_of_memory(directory: Path) -> None:
    tiny_model(MODELS[0], directory)
    with pytest.raises(OutOfMemory):
        Chain(directory / MODELS[0].name, 1, device="cuda", num_blocks=2**31)
