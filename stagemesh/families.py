"""The families of models, as data: what their layers have, and what of config.json they look at.

A key that would change the numbers, and that a family does not look at, must have the value at
which it changes none: else it is refused by name. Knows neither tensors nor files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stagemesh.config_values import number
from stagemesh.errors import UnsupportedModel

SILU = "silu"
GELU_TANH = "gelu_tanh"
# As config.json spells them.
_ACTIVATIONS = {SILU: ("silu", "swish"), GELU_TANH: ("gelu_pytorch_tanh",)}
# Keys of some families that change the numbers, and the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "no_rope_layers": (None, []),
    "rope_local_base_freq": (None,),
    "attention_chunk_size": (None,),
    "use_bidirectional_attention": (None, False),
    "clip_qkv": (None,),
    "qk_layernorm": (None, False),
    "swiglu_alpha": (None,),
    "swiglu_limit": (None,),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
}


@dataclass(frozen=True, slots=True)
class Norms:
    """The RMS norms of a layer: `before` attention and feed-forward part, of what they take, and
    `after` them, of what they give; `heads` of queries and keys, each head, or `projections`, over
    all heads together. Weights are stored less `offset`. `wide`: multiplied by in float32, not in
    the type that is computed with.
    """

    before: bool = True
    after: bool = False
    heads: bool = False
    projections: bool = False
    offset: float = 0.0
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Scales:
    """Factors and caps; those that a model does not have are neutral.

    `embedding` multiplies embeddings, `residual` what is added to hidden states, `attention` scores
    (None: by head_dim ** -0.5); `logits` divides logits. A cap c makes c * tanh(x / c) of an x.
    """

    embedding: float = 1.0
    residual: float = 1.0
    attention: float | None = None
    attention_cap: float | None = None
    logits: float = 1.0
    logit_cap: float | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """`understands`: keys that it looks at and others have to leave neutral. `attention_bias`,
    `mlp_bias`: whether the key of that name is looked at; `qkv_bias`: whether there is always one.
    `sinks`: attention has a score of each head beside those of the keys, of no value. Other
    defaults, also `has_attention_bias`, are those that transformers takes where the key is missing.
    """

    name: str
    norms: Norms = Norms()
    understands: frozenset[str] = frozenset()
    activation: str = SILU
    qkv_bias: bool = False
    attention_bias: bool = False
    has_attention_bias: bool = False
    mlp_bias: bool = False
    sinks: bool = False
    tie_embeddings: bool = False
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6


_GEMMA_KEYS = frozenset(
    {"attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"}
)
_GRANITE_KEYS = frozenset(
    {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"}
)
_EXPERT_KEYS = frozenset({"num_local_experts", "num_experts"})
_GPT_OSS_KEYS = _EXPERT_KEYS | {"swiglu_alpha", "swiglu_limit"}
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", attention_bias=True, mlp_bias=True),
    "MistralForCausalLM": Family("mistral"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": Family("qwen3", Norms(heads=True), attention_bias=True, head_dim=128),
    "MixtralForCausalLM": Family("mixtral", understands=_EXPERT_KEYS),
    "Qwen2MoeForCausalLM": Family("qwen2_moe", understands=_EXPERT_KEYS, qkv_bias=True),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe", Norms(heads=True), understands=_EXPERT_KEYS, attention_bias=True
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        Norms(wide=True),
        understands=_GPT_OSS_KEYS,
        attention_bias=True,
        has_attention_bias=True,
        sinks=True,
        head_dim=64,
        rms_norm_eps=1e-5,
    ),
    "Phi3ForCausalLM": Family("phi3", rms_norm_eps=1e-5),
    "GraniteForCausalLM": Family(
        "granite", understands=_GRANITE_KEYS, attention_bias=True, mlp_bias=True
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        understands=frozenset({"no_rope_layers"}),
        attention_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2",
        Norms(before=False, after=True, projections=True, wide=True),
        attention_bias=True,
        rms_norm_eps=1e-5,
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        Norms(after=True, offset=1.0, wide=True),
        understands=_GEMMA_KEYS,
        activation=GELU_TANH,
        attention_bias=True,
        tie_embeddings=True,
        head_dim=256,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        Norms(after=True, heads=True, offset=1.0, wide=True),
        # Its attention has no cap, whatever a config says of one.
        understands=(_GEMMA_KEYS | {"rope_local_base_freq"}) - {"attn_logit_softcapping"},
        activation=GELU_TANH,
        attention_bias=True,
        tie_embeddings=True,
        head_dim=256,
    ),
}


def find_family(config: Mapping[str, Any]) -> tuple[str, Family]:
    """Architecture and family of a parsed config.json; raises UnsupportedModel naming what it is or
    has that is not supported."""
    named = config.get("architectures") or []
    model_type = config.get("model_type")
    if not named:  # a bare config: the type decides
        named = [name for name, family in FAMILIES.items() if family.name == model_type]
    name = str(named[0]) if named else ""
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"architectures: {name or model_type!r} is not supported (known: {', '.join(FAMILIES)})"
        )
    _refuse_unsupported(config, FAMILIES[name])
    return name, FAMILIES[name]


def has_qkv_bias(config: Mapping[str, Any], family: Family) -> bool:
    """Whether there is one whatever `attention_bias` says."""
    return family.qkv_bias and (family.name != "qwen2_moe" or bool(config.get("qkv_bias", True)))


def parse_scales(config: Mapping[str, Any], family: Family, hidden_size: int) -> Scales:
    """Raises CheckpointError naming the key."""
    if family.name == "granite":
        return Scales(
            embedding=number(config, "embedding_multiplier", 1.0),
            residual=number(config, "residual_multiplier", 1.0),
            attention=number(config, "attention_multiplier", 1.0),
            logits=number(config, "logits_scaling", 1.0),
        )
    if family.name not in ("gemma2", "gemma3_text"):
        return Scales()
    has_caps = family.name == "gemma2"
    return Scales(
        embedding=hidden_size**0.5,
        attention=number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        attention_cap=_cap(config, "attn_logit_softcapping", 50.0) if has_caps else None,
        logit_cap=_cap(config, "final_logit_softcapping", 30.0 if has_caps else None),
    )


def _cap(config: Mapping[str, Any], key: str, default: float | None) -> float | None:
    """Null is for no cap, where a key that is missing is for the default."""
    value = config.get(key, default)
    return None if value is None else number(config, key, value)


def _refuse_unsupported(config: Mapping[str, Any], family: Family) -> None:
    for key in ("hidden_act", "hidden_activation"):
        value = config.get(key)
        if value is not None and value not in _ACTIVATIONS[family.activation]:
            known = ", ".join(_ACTIVATIONS[family.activation])
            raise UnsupportedModel(f"{key} {value!r} is not supported (known: {known})")
    for key, neutral in _NEUTRAL.items():
        if key not in family.understands and config.get(key) not in neutral:
            raise UnsupportedModel(
                f"{key} {config[key]!r} is not supported in {family.name} models"
            )
