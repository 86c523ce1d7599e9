"""Greedy tokens of Gemma 2 and 3, Phi-3, Granite, SmolLM3 and OLMo 2 are those of transformers.

Random checkpoints of two seeds and more, prompts past the sliding window and past the context from
which longrope turns otherwise, in one stage and in three, whole and in chunks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.checkpoints import SIZES, TinyModel, tiny_model
from support.greedy import check_greedy, wishes
from support.stages import Chain

from stage_worker.cuda_support import check_supported
from stage_worker.quantise_checkpoint import quantise_checkpoint
from stagemesh.errors import UnsupportedModel
from stagemesh.model_spec import parse_config
from stagemesh.quantization import parse_quantization

KINDS = ["sliding_attention", "full_attention"]
GEMMA = {"head_dim": 24, "sliding_window": 9, "query_pre_attn_scalar": 20}


def longrope(original: int, **more: Any) -> dict[str, Any]:
    """Of heads of 16 dimensions, three quarters of which are rotated."""
    return {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.3, 1.5, 1.7, 2.0],
            "long_factor": [1.0, 1.6, 2.5, 4.0, 7.0, 9.0],
            "original_max_position_embeddings": original,
            **more,
        },
        "original_max_position_embeddings": original,
        "pad_token_id": 0,
    }


FAMILIES = [
    TinyModel("gemma2", "Gemma2Config", {**GEMMA, "attn_logit_softcapping": 2.0}),
    TinyModel(
        "gemma2-uncapped",
        "Gemma2Config",
        {
            **GEMMA,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": 5.0,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "layer_types": [*KINDS, *KINDS[::-1], KINDS[0]],
        },
    ),
    TinyModel("gemma3", "Gemma3TextConfig", {**GEMMA, "final_logit_softcapping": 8.0}),
    TinyModel(
        "gemma3-linear",
        "Gemma3TextConfig",
        {
            **GEMMA,
            "layer_types": [*KINDS, *KINDS, KINDS[0]],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    ),
    TinyModel("phi3-window", "Phi3Config", {"sliding_window": 11, "pad_token_id": 0}),
    TinyModel("phi3-long", "Phi3Config", longrope(48)),  # some requests are longer, some are not
    TinyModel("phi3-attention-factor", "Phi3Config", longrope(96, attention_factor=1.4)),
    TinyModel(
        "granite",
        "GraniteConfig",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.4,
            "logits_scaling": 3.0,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    TinyModel("smollm3", "SmolLM3Config", {"no_rope_layers": [1, 0, 1, 1, 0], "pad_token_id": 0}),
    TinyModel(
        "smollm3-window",
        "SmolLM3Config",
        {"use_sliding_window": True, "sliding_window": 9, "pad_token_id": 0},
    ),
    TinyModel("olmo2", "Olmo2Config", {"pad_token_id": 0}),
    TinyModel("smollm2", "LlamaConfig", {"tie_word_embeddings": True, "rope_theta": 1e5}),
]
# One of each family a second time, with other weights and prompts.
AGAIN = ("gemma2", "gemma3-linear", "phi3-long", "granite", "smollm3", "olmo2")
MODELS = FAMILIES + [
    replace(model, name=f"{model.name}-again", seed=1) for model in FAMILIES if model.name in AGAIN
]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_greedy_tokens_are_those_of_transformers(model: TinyModel, tmp_path: Path) -> None:
    reference = tiny_model(model, tmp_path)
    for num_stages, chunk in ((1, None), (3, 7)):
        chain = Chain(tmp_path / model.name, num_stages, seed=num_stages)
        for live in chain.run(wishes(model), chunk=chunk):
            check_greedy(reference, live)


def test_fused_weights_are_quantised_alike(tmp_path: Path) -> None:
    """At load or by `stagemesh quantize`, and with KV in fewer bits: the same tokens."""
    model = FAMILIES[4]
    tiny_model(model, tmp_path)
    stored = tmp_path / "stored"
    quantise_checkpoint(tmp_path / model.name, stored, parse_quantization("int8"))
    outputs = []
    for path, quantization, num_stages in ((tmp_path / model.name, "int8", 1), (stored, "auto", 3)):
        chain = Chain(path, num_stages, quantization=quantization, kv_dtype="int8")
        outputs.append([live.tokens for live in chain.run(wishes(model))])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("gemma2", ["attn_logit_softcapping", "final_logit_softcapping", "gelu_tanh"]),
        ("gemma3", ["several rotary embeddings"]),
        ("phi3-long", ["partial_rotary_factor"]),
        ("granite", ["residual_multiplier", "logits_scaling", "scaled embeddings"]),
        ("smollm3", ["no_rope_layers"]),
        ("olmo2", ["norms of whole projections", "norms after"]),
    ],
)
def test_what_cuda_lacks_is_named(name: str, named: list[str]) -> None:
    (model,) = (one for one in FAMILIES if one.name == name)
    config = getattr(transformers, model.config_class)(**{**SIZES, **model.config})
    with pytest.raises(UnsupportedModel) as raised:
        check_supported(parse_config(config.to_dict(), {}))
    assert all(feature in str(raised.value) for feature in named)
