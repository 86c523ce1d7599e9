"""Stages whose layers are split over ranks choose transformers' tokens, whatever their number.

Ranks are threads here; processes are in tests/integration/test_ranks.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.checkpoints import SIZES, TinyModel, prompts, tiny_model
from support.greedy import check_greedy
from support.stages import Chain, Live, Wish
from support.thread_ranks import ranked_chain

from stagemesh.sampling import SamplingSpec

FOUR_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = [
    # Two KV heads for four ranks, and a vocabulary that does not divide.
    TinyModel("llama", "LlamaConfig", {**FOUR_HEADS, "vocab_size": 322}, 2),
    TinyModel("llama-tied", "LlamaConfig", {**FOUR_HEADS, "tie_word_embeddings": True}),
    TinyModel(
        "llama-biases", "LlamaConfig", {**FOUR_HEADS, "attention_bias": True, "mlp_bias": True}
    ),
    TinyModel("qwen2", "Qwen2Config", FOUR_HEADS, 3),
    TinyModel("qwen3", "Qwen3Config", {**FOUR_HEADS, "head_dim": 32}, 4),
    TinyModel("phi3-fused", "Phi3Config", {**FOUR_HEADS, "pad_token_id": 0}, 1),
    TinyModel("gemma2", "Gemma2Config", {**FOUR_HEADS, "head_dim": 16, "sliding_window": 11}, 1),
    TinyModel("granite", "GraniteConfig", {**FOUR_HEADS, "residual_multiplier": 0.5}, 1),
    TinyModel("mixtral", "MixtralConfig", {**FOUR_HEADS, "num_local_experts": 4}, 1),
    TinyModel(
        "qwen2-moe",
        "Qwen2MoeConfig",
        {
            **FOUR_HEADS,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 24,
        },
    ),
    # Norms over all heads of all ranks.
    TinyModel("olmo2", "Olmo2Config", {**FOUR_HEADS, "pad_token_id": 0}, 5),
    TinyModel(
        "gpt-oss",
        "GptOssConfig",
        {
            **FOUR_HEADS,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 11,
            "swiglu_limit": 0.7,
            "pad_token_id": 0,
        },
        1,
    ),
]
IN_EVERY_LAYOUT = ("llama", "olmo2")
LAYOUTS = ((4,), (2, 1))
"""Ranks of the stages."""
NUM_TOKENS = 12
# Drawn, with penalties and without, and told of: what needs all logits on one rank.
DRAWN = [
    SamplingSpec(temperature=1.0, seed=7, num_logprobs=3),
    SamplingSpec(temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=8),
    SamplingSpec(temperature=0.0, presence_penalty=0.5),
    SamplingSpec(temperature=0.0),
]

GREEDY = DRAWN[-1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_greedy_tokens_are_those_of_transformers(model: TinyModel, directory: Path) -> None:
    reference = tiny_model(model, directory)
    wishes = [Wish(p, NUM_TOKENS) for p in prompts(3, (5, 19, 40), SIZES["vocab_size"], model.seed)]
    number = MODELS.index(model)
    in_all = model.name in IN_EVERY_LAYOUT
    for sizes in LAYOUTS if in_all else LAYOUTS[number % 2 :][:1]:
        with ranked_chain(directory / model.name, sizes) as chain:
            for live in chain.run(wishes, chunk=7, max_rows=2):
                check_greedy(reference, live)
            assert all(stage.num_sequences == 0 for stage in chain.stages)


def test_what_is_drawn_and_told_is_the_same_as_of_one_rank(directory: Path) -> None:
    tiny_model(MODELS[0], directory)
    wishes = [
        Wish(prompt, NUM_TOKENS, sampling, prompt_logprobs=i == 0)
        for i, (prompt, sampling) in enumerate(
            zip(prompts(len(DRAWN), (9, 30), SIZES["vocab_size"], 5), DRAWN, strict=True)
        )
    ]
    wanted = Chain(directory / MODELS[0].name).run(wishes)
    with ranked_chain(directory / MODELS[0].name, (2, 4)) as chain:
        found = chain.run(wishes)
    assert [live.tokens for live in found] == [live.tokens for live in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert [t.token_id for t in one.prompt_logprobs] == [
            t.token_id for t in other.prompt_logprobs
        ]
        for told, known in zip(
            [*one.sampled, *one.prompt_logprobs],
            [*other.sampled, *other.prompt_logprobs],
            strict=True,
        ):
            assert told.logprob == pytest.approx(known.logprob, abs=1e-4)


def test_numbers_that_are_not_finite_end_their_own_row_only(directory: Path) -> None:
    model = TinyModel("llama-nan", "LlamaConfig", FOUR_HEADS)
    tiny_model(model, directory)
    with ranked_chain(directory / model.name, (2,)) as chain, torch.inference_mode():
        for rank in chain.stages[0].ranks:
            embedding = rank._decoder._weights.embedding
            if rank._follows:  # its half of the vocabulary has token 319
                embedding[-1] = float("nan")
        bad, good = chain.run([Wish([5, 319, 6], 4, GREEDY), Wish([5, 6, 7], 4, GREEDY)])
    assert bad.error is not None
    assert good.error is None
    assert len(good.sampled) == 4


@pytest.mark.parametrize("model", [m for m in MODELS if m.name in IN_EVERY_LAYOUT], ids=str)
def test_with_batch_invariance_a_rows_bits_depend_on_nothing_else(
    model: TinyModel, directory: Path
) -> None:
    tiny_model(model, directory)
    wishes = [Wish(p, 6, prompt_logprobs=True) for p in prompts(3, (9, 17), 320, 6)]
    found = []
    with ranked_chain(directory / model.name, (2, 2), batch_invariant=True) as chain:
        for chunk, max_rows in ((None, 3), (4, 1)):
            found.append(chain.run(wishes, chunk=chunk, max_rows=max_rows))
    for one, other in zip(*found, strict=True):
        assert (one.sampled, one.prompt_logprobs) == (other.sampled, other.prompt_logprobs)


@pytest.mark.parametrize("quantization", ["int8", "int4-g32"])
def test_layers_that_are_quantised_when_they_are_loaded(directory: Path, quantization: str) -> None:
    """Each rank quantises what it has. Near to the floats, and the same for every cut and batch."""
    model = TinyModel("llama-quantised", "LlamaConfig", {**FOUR_HEADS, "intermediate_size": 128})
    tiny_model(model, directory)
    wishes = [Wish(p, 1, prompt_logprobs=True) for p in prompts(2, (20, 9), 320, 1)]
    exact = Chain(directory / model.name).run(wishes)
    alone = Chain(directory / model.name, quantization=quantization).run(wishes)
    with ranked_chain(directory / model.name, (2, 4), quantization=quantization) as chain:
        split = chain.run(wishes, chunk=5)
    assert error(split, exact) <= 1.5 * error(alone, exact)


def error(lives: list[Live], exact: list[Live]) -> float:
    """Of log-probabilities, root mean square."""
    squares = [
        (one.logprob - other.logprob) ** 2
        for live, true in zip(lives, exact, strict=True)
        for one, other in zip(live.prompt_logprobs, true.prompt_logprobs, strict=True)
    ]
    return math.sqrt(sum(squares) / len(squares))
