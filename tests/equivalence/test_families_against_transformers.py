"""Greedy tokens are those of transformers, for every family and rope scaling, however it is cut."""

from __future__ import annotations

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
from support.greedy import check_greedy, wishes
from support.stages import Chain, Wish
from support.thorough import sample

QWEN_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
# Limits that many a number is beyond.
GPT_OSS = {
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "sliding_window": 9,
    "swiglu_limit": 0.7,
    "pad_token_id": 0,
    **rope("yarn", factor=4.0, original_max_position_embeddings=32, truncate=False),
}
MODELS = [
    TinyModel("llama-mha-untied", "LlamaConfig", {"num_key_value_heads": 4}, 2),
    TinyModel("llama-gqa-tied-sharded", "LlamaConfig", {"tie_word_embeddings": True}, 0, "60KB"),
    TinyModel("llama-head-dim", "LlamaConfig", {"head_dim": 24, "num_key_value_heads": 1}),
    TinyModel("llama-biases", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    TinyModel("llama-linear", "LlamaConfig", rope("linear", factor=4.0)),
    TinyModel("llama-dynamic", "LlamaConfig", rope("dynamic", factor=4.0)),
    TinyModel(
        "llama-llama3",
        "LlamaConfig",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        1,
    ),
    TinyModel(
        "llama-yarn",
        "LlamaConfig",
        rope("yarn", factor=4.0, original_max_position_embeddings=32),
    ),
    TinyModel(
        "llama-yarn-mscale",
        "LlamaConfig",
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            mscale=1.2,
            mscale_all_dim=0.6,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        ),
        4,
    ),
    TinyModel("mistral-window", "MistralConfig", {"sliding_window": 11}),
    TinyModel("mistral-full", "MistralConfig", {"sliding_window": None}),
    TinyModel("qwen2-tied", "Qwen2Config", {"tie_word_embeddings": True}),
    TinyModel(
        "qwen2-window",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
        1,
        "60KB",
    ),
    TinyModel("qwen3", "Qwen3Config", {"head_dim": 32}, 4),
    TinyModel(
        "qwen3-layer-types-yarn",
        "Qwen3Config",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 10,
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
            **rope("yarn", factor=2.0, attention_factor=1.3, original_max_position_embeddings=64),
        },
        2,
    ),
    TinyModel("mixtral", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    TinyModel(
        "mixtral-window",
        "MixtralConfig",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 11},
        1,
    ),
    TinyModel("qwen2-moe", "Qwen2MoeConfig", {**QWEN_MOE, "shared_expert_intermediate_size": 40}),
    TinyModel(
        "qwen2-moe-mixed",
        "Qwen2MoeConfig",
        {
            **QWEN_MOE,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1, 2],
            "qkv_bias": False,
        },
        1,
    ),
    TinyModel("qwen3-moe", "Qwen3MoeConfig", {**QWEN_MOE, "norm_topk_prob": True}),
    TinyModel("qwen3-moe-sparse", "Qwen3MoeConfig", {**QWEN_MOE, "decoder_sparse_step": 2}, 1),
    TinyModel("gpt-oss", "GptOssConfig", GPT_OSS),
    TinyModel(
        "gpt-oss-mixed",
        "GptOssConfig",
        {
            **GPT_OSS,
            "num_key_value_heads": 1,
            "attention_bias": False,
            "layer_types": ["full_attention", *["sliding_attention"] * 3, "full_attention"],
            "rope_parameters": None,
            "swiglu_alpha": 1.1,
        },
        4,
    ),
]


# Stages, rows at once, and the longest chunk.
CUTS = [(1, 1, 7), (2, 3, None), (5, 3, 7)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_greedy_tokens_are_those_of_transformers(model: TinyModel, directory: Path) -> None:
    reference = tiny_model(model, directory)
    for num_stages, max_rows, chunk in sample(CUTS, MODELS.index(model), 2):
        chain = Chain(directory / model.name, num_stages, seed=num_stages)
        for live in chain.run(wishes(model), chunk=chunk, max_rows=max_rows):
            check_greedy(reference, live)
        assert all(stage.num_sequences == 0 for stage in chain.stages)


def test_dynamic_rope_beyond_its_context_is_fixed_by_the_total_length(directory: Path) -> None:
    """All positions turn as transformers turns them in a prompt of the request's full length."""
    model = TinyModel("llama-dynamic-long", "LlamaConfig", rope("dynamic", factor=4.0), 1)
    reference = tiny_model(model, directory)
    (prompt,) = prompts(1, (200,), SIZES["vocab_size"], 5)
    chain = Chain(directory / model.name, 2)
    short = Wish(prompt[:30], 8)  # in the same batch, within the context: another scale
    live, other = chain.run([Wish(prompt, 1, prompt_logprobs=True), short], chunk=50)
    expected = reference_logprobs(reference, [*prompt, 3])  # 201 tokens: prompt + max_tokens
    wanted = torch.tensor([expected[i, token] for i, token in enumerate(prompt[1:])])
    got = torch.tensor([token.logprob for token in live.prompt_logprobs])
    assert [token.position for token in live.prompt_logprobs] == list(range(1, 200))
    assert torch.allclose(got, wanted, atol=1e-4)
    alone = reference_logprobs(reference, other.tokens)[29:-1].argmax(dim=-1)
    assert [token.token_id for token in other.sampled] == alone.tolist()
