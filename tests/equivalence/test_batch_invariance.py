"""With batch_invariant a row's log-probabilities have the same bits in any company and any cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import SIZES, TinyModel, prompts, rope, tiny_model
from support.stages import Chain, Live, Wish
from support.thorough import THOROUGH, sample

from stagemesh.sampling import SamplingSpec

NUM_TOKENS = 8
SPEC = SamplingSpec(temperature=0.8, seed=11, top_p=0.95, num_logprobs=5)
# Sizes that fill no vector registers, so that the ends of rows and tensors matter.
ODD = {"hidden_size": 72, "intermediate_size": 172, "vocab_size": 333, "head_dim": 20}
MODELS = [
    TinyModel("odd-llama", "LlamaConfig", {**ODD, "attention_bias": True}),
    TinyModel("odd-mistral", "MistralConfig", {**ODD, "sliding_window": 70}),
    TinyModel("qwen3-dynamic", "Qwen3Config", {"head_dim": 16, **rope("dynamic", factor=2.0)}),
    TinyModel("tied", "LlamaConfig", {"tie_word_embeddings": True}),
    TinyModel(
        "experts",
        "Qwen2MoeConfig",
        {
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 12,
        },
    ),
    TinyModel(
        "odd-gpt-oss",
        "GptOssConfig",
        {
            **ODD,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "sliding_window": 70,
            "swiglu_limit": 0.7,
            "pad_token_id": 0,
        },
    ),
    TinyModel("odd-gemma2", "Gemma2Config", {**ODD, "sliding_window": 70}),
]


def wishes(num: int) -> list[Wish]:
    lengths = (90, 5, 66, 1, 23, 64)
    return [
        Wish(prompt, NUM_TOKENS, SPEC, prompt_logprobs=True)
        for prompt in prompts(num, lengths, SIZES["vocab_size"], 3)
    ]


def facts(live: Live) -> tuple[object, ...]:
    return live.sampled, live.prompt_logprobs


# Stages, the longest chunk, tokens in a block, rows at once.
CUTS = [(1, 1, None, 32), (1, 7, None, 3), (2, None, None, 2), (3, 7, 16, 32), (5, 1, 4, 6)]
# Around the sizes that kernels work in.
SIZES_OF_BATCHES = range(2, 33) if THOROUGH else (2, 3, 5, 8, 9, 16, 17, 31, 32)
CASES = [(model, "auto") for model in MODELS] + [(MODELS[0], "bfloat16"), (MODELS[1], "int8")]


@pytest.mark.parametrize(("model", "kv_dtype"), CASES, ids=str)
def test_bits_do_not_depend_on_batch_chunk_stages_or_blocks(
    model: TinyModel, kv_dtype: str, tmp_path: Path
) -> None:
    tiny_model(model, tmp_path)
    path = tmp_path / model.name
    alone = Chain(path, 1, batch_invariant=True, kv_dtype=kv_dtype)
    expected = [facts(live) for live in alone.run(wishes(6), max_rows=1)]
    for num_stages, chunk, block_size, max_rows in sample(CUTS, CASES.index((model, kv_dtype)), 3):
        chain = Chain(
            path,
            num_stages,
            batch_invariant=True,
            block_size_tokens=block_size or 8,
            num_blocks=1024,
            seed=num_stages,
            kv_dtype=kv_dtype,
        )
        company = wishes(min(max_rows, 32) if max_rows > 6 else 6)
        got = [facts(live) for live in chain.run(company, chunk=chunk, max_rows=max_rows)][:6]
        assert got == expected, f"{num_stages} stages, chunk {chunk}, {max_rows} rows"


def test_bits_of_one_request_in_batches_of_many_sizes(tmp_path: Path) -> None:
    model = MODELS[0]
    tiny_model(model, tmp_path)
    chain = Chain(tmp_path / model.name, 1, batch_invariant=True, num_blocks=2048)
    (expected,) = chain.run(wishes(1))
    for size in SIZES_OF_BATCHES:
        company = [*wishes(size)[1:], wishes(1)[0]]
        live = chain.run([Wish(w.prompt, 2, SPEC) for w in company])[-1]
        assert live.sampled == expected.sampled[:2], f"batch of {size}"


def test_the_fast_kernels_would_fail_this(tmp_path: Path) -> None:
    """Else the tests above would show nothing: without the flag some bits do change."""
    model = MODELS[0]
    tiny_model(model, tmp_path)
    chain = Chain(tmp_path / model.name, 1)
    alone = [facts(live) for live in chain.run(wishes(6), max_rows=1)]
    assert alone != [facts(live) for live in chain.run(wishes(6), chunk=7)]


def test_bits_with_two_threads(tmp_path: Path) -> None:
    model = MODELS[0]
    tiny_model(model, tmp_path)
    few = [Wish(wish.prompt, 2, SPEC, prompt_logprobs=True) for wish in wishes(3)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        chain = Chain(tmp_path / model.name, 2, batch_invariant=True)
        expected = [facts(live) for live in chain.run(few, max_rows=1)]
        assert [facts(live) for live in chain.run(few, chunk=7)] == expected
    finally:
        torch.set_num_threads(before)
