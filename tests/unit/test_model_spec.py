"""configs of every family mean what transformers makes of them; what is not understood is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stagemesh.errors import CheckpointError, UnsupportedModel
from stagemesh.model_spec import ModelSpec, parse_config
from stagemesh.moe_spec import ClampedSwiglu, MoeSpec

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
}


def spec(generation: dict[str, Any] | None = None, **config: Any) -> ModelSpec:
    return parse_config({**BASE, **config}, generation or {})


def family(name: str) -> dict[str, Any]:
    return {"architectures": [f"{name}ForCausalLM"]}


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_both_forms_of_rope_mean_the_same(scaling: dict[str, Any] | None) -> None:
    old = spec(rope_theta=5e5, rope_scaling=scaling)
    new = spec(rope_parameters={"rope_theta": 5e5, **(scaling or {"rope_type": "default"})})
    assert old == new
    assert old.rope.theta == 5e5
    assert old.rope.kind == (scaling or {}).get("rope_type", "linear" if scaling else "default")


def test_dynamic_rope_stretches_the_context() -> None:
    dynamic = spec(rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    assert (dynamic.dynamic_rope_length, dynamic.context_length) == (128, 512)
    assert (spec().dynamic_rope_length, spec().context_length) == (0, 128)


def test_yarn_attention_factor() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert spec(rope_scaling=yarn).rope.attention_factor == pytest.approx(1.1386294)
    given = spec(rope_scaling={**yarn, "attention_factor": 1.5})
    assert given.rope.attention_factor == 1.5


def test_flags_of_the_families() -> None:
    assert not spec().qkv_bias
    assert spec(attention_bias=True).output_bias
    qwen2 = spec(**family("Qwen2"))
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = spec(**family("Qwen3"))
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    assert spec(head_dim=24).head_dim == 24


def test_experts() -> None:
    assert spec().moe is None
    experts = {"num_experts_per_tok": 2, "num_local_experts": 8}
    mixtral = spec(**family("Mixtral"), **experts)
    assert mixtral.moe == MoeSpec(8, 2, BASE["intermediate_size"], 0, True, (True,) * 4)
    assert mixtral.layer_windows == (None,) * 4
    qwen = {**experts, "moe_intermediate_size": 24, "decoder_sparse_step": 2}
    qwen3 = spec(**family("Qwen3Moe"), **qwen)
    assert qwen3.moe == MoeSpec(8, 2, 24, 0, False, (False, True, False, True))
    assert qwen3.qk_norm
    more = {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}
    qwen2 = spec(**family("Qwen2Moe"), **qwen, **more, norm_topk_prob=True)
    assert qwen2.moe == MoeSpec(8, 2, 24, 40, True, (False, False, False, True))
    assert qwen2.qkv_bias
    gpt_oss = spec(**family("GptOss"), **experts)
    assert gpt_oss.moe == MoeSpec(
        *(8, 2, BASE["intermediate_size"], 0, True, (True,) * 4), True, ClampedSwiglu(1.702, 7.0)
    )
    assert (gpt_oss.sinks, gpt_oss.qkv_bias, gpt_oss.output_bias) == (True, True, True)
    assert gpt_oss.layer_windows == (128, None, 128, None)
    assert (gpt_oss.rope.kind, gpt_oss.rope.truncate, gpt_oss.head_dim) == ("yarn", False, 64)
    assert not spec(**family("GptOss"), **experts, attention_bias=False).qkv_bias
    with pytest.raises(CheckpointError, match="num_experts_per_tok 9 is more than the 8 experts"):
        spec(**family("Mixtral"), num_local_experts=8, num_experts_per_tok=9)
    with pytest.raises(CheckpointError, match="num_experts must be"):
        spec(**family("Qwen3Moe"))


def test_windows() -> None:
    assert spec(sliding_window=7).layer_windows == (None,) * 4
    assert spec(**family("Mistral"), sliding_window=7).layer_windows == (7,) * 4
    assert spec(**family("Mistral"), sliding_window=7).sliding_window == 7
    assert spec(**family("Mistral")).layer_windows == (4096,) * 4
    assert spec(**family("Mistral"), sliding_window=None).layer_windows == (None,) * 4
    qwen = {**family("Qwen2"), "sliding_window": 7, "max_window_layers": 3}
    assert spec(**qwen).layer_windows == (None,) * 4
    assert spec(**qwen, use_sliding_window=True).layer_windows == (None, None, None, 7)
    types = ["sliding_attention", "full_attention"] * 2
    mixed = spec(**qwen, use_sliding_window=True, layer_types=types)
    assert mixed.layer_windows == (7, None, 7, None)
    assert mixed.sliding_window is None


def test_dtype_and_token_ids() -> None:
    assert spec(torch_dtype="bfloat16").dtype == "bfloat16"
    assert spec(dtype="float16", torch_dtype="float32").dtype == "float16"
    assert spec(eos_token_id=2).eos_token_ids == (2,)
    assert spec({"eos_token_id": [5, 6]}, eos_token_id=2).eos_token_ids == (5, 6)
    assert spec(bos_token_id=1).bos_token_id == 1


def test_gemma_is_read_in_both_forms() -> None:
    old = spec(
        **family("Gemma3"),
        num_hidden_layers=7,
        sliding_window=5,
        rope_theta=2e6,
        rope_local_base_freq=3e3,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        query_pre_attn_scalar=64,
    )
    assert old.layer_windows == (5,) * 5 + (None, 5)
    assert old.layer_ropes == (1,) * 5 + (0, 1)
    assert [(rope.kind, rope.theta, rope.factor) for rope in old.ropes] == [
        ("linear", 2e6, 8.0),
        ("default", 3e3, 1.0),
    ]
    assert (old.head_dim, old.tie_embeddings) == (256, True)
    assert (old.scales.embedding, old.scales.attention) == (8.0, 0.125)
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
    }
    assert spec(**family("Gemma3"), rope_parameters=nested).ropes == old.ropes
    gemma2 = spec(**family("Gemma2"))
    assert (gemma2.scales.attention_cap, gemma2.scales.logit_cap) == (50.0, 30.0)
    assert gemma2.layer_windows == (4096, None, 4096, None)


LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_longrope_by_any_of_its_names(kind: str) -> None:
    phi = spec(
        **family("Phi3"), original_max_position_embeddings=64, rope_scaling={"type": kind, **LONG}
    )
    assert (phi.rope.kind, phi.dynamic_rope_length, phi.context_length) == ("longrope", 64, 128)
    assert phi.rope.attention_factor == pytest.approx(1.0801234)


def test_layers_without_rotation() -> None:
    assert spec(**family("SmolLM3")).layer_ropes == (0, 0, 0, None)
    assert spec(**family("SmolLM3"), no_rope_layers=[0, 1, 1, 0, 1]).layer_ropes == (
        None,
        0,
        0,
        None,
    )


UNSUPPORTED = {
    "architectures": {"architectures": ["GPT2LMHeadModel"]},
    "mamba": {"architectures": [], "model_type": "mamba"},
    "hidden_act": {"hidden_act": "gelu"},
    "quantization_config": {"quantization_config": {"quant_method": "hqq"}},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "rope_type": {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
    "mystery": {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mystery": 1}},
    "dtype": {"torch_dtype": "float64"},
    "logits_scaling": {"logits_scaling": 8.0},
    "layer_types": {**family("Mistral"), "layer_types": ["full_attention"] * 4},
    "num_local_experts": {"num_local_experts": 4},
    "final_logit_softcapping": {"final_logit_softcapping": 30.0},
    "attn_logit_softcapping": {**family("Gemma3"), "attn_logit_softcapping": 50.0},
    "use_bidirectional_attention": {**family("Gemma3"), "use_bidirectional_attention": True},
    "hidden_activation": {**family("Gemma2"), "hidden_activation": "silu"},
    "sliding_window": {**family("Gemma2"), "sliding_window": None},
    "yarn": {**family("Gemma3"), "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "llama3": {**family("Phi3"), "rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
    "short_mscale": {
        **family("Phi3"),
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", **LONG, "short_mscale": 1.2},
    },
    "embedding_multiplier": {"embedding_multiplier": 12.0},
    "no_rope_layers": {"no_rope_layers": [1, 0, 1, 0]},
    "rope_local_base_freq": {**family("Gemma2"), "rope_local_base_freq": 1e4},
    "swiglu_limit": {**family("Mixtral"), "swiglu_limit": 7.0},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4"}},
    "Llama4ForCausalLM": family("Llama4"),
}


@pytest.mark.parametrize(("key", "config"), UNSUPPORTED.items(), ids=UNSUPPORTED)
def test_what_is_not_understood_is_named(key: str, config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=key):
        spec(**config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"eos_token_id": "two"}, "eos_token_id"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({**family("Gemma2"), "query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({**family("SmolLM3"), "no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({**family("Phi3"), "partial_rotary_factor": 0.2}, "partial_rotary_factor 0.2"),
        ({**family("Phi3"), "rope_scaling": {"type": "longrope", **LONG}}, "original_max_position"),
    ],
)
def test_wrong_values_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        spec(**config)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        ModelSpec.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ModelSpec.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        ModelSpec.from_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3]}')
    assert ModelSpec.from_directory(tmp_path).eos_token_ids == (3,)
