"""What a mixture of experts is: the meaning of those keys of config.json.

Covers Mixtral, Qwen2-MoE, Qwen3-MoE and GPT-OSS: a softmax over all experts, of which a token's
likeliest few are taken. Knows neither tensors nor files of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from stagemesh.config_values import number
from stagemesh.errors import CheckpointError

_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")


@dataclass(frozen=True, slots=True)
class ClampedSwiglu:
    """(up + 1) * gate * sigmoid(alpha * gate), of a gate that is `limit` at most and of an up
    within [-limit, limit]."""

    alpha: float
    limit: float


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """`num_chosen` of `num_experts` experts take each token, in those layers that are `sparse`.

    `intermediate_size` is that of one expert, `shared_size` that of the expert that takes every
    token, 0 where there is none. `renormalised`: the weights of a token's experts sum up to one,
    as those of a softmax over their scores alone do. `biased`: router and experts have biases.
    `swiglu` is what joins the halves of an expert, None where it is what the model's activation
    says.
    """

    num_experts: int
    num_chosen: int
    intermediate_size: int
    shared_size: int
    renormalised: bool
    sparse: tuple[bool, ...]
    biased: bool = False
    swiglu: ClampedSwiglu | None = None


def parse_moe(config: Mapping[str, Any], family: str, num_layers: int) -> MoeSpec | None:
    """Of a parsed config.json; None for families without experts. Raises CheckpointError."""
    if family not in _FAMILIES:
        return None
    num_experts = _count(config, "num_experts", "num_local_experts")
    num_chosen = _count(config, "num_experts_per_tok")
    if num_chosen > num_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok {num_chosen} is more than the {num_experts} experts"
        )
    if family in ("mixtral", "gpt_oss"):
        size = _count(config, "intermediate_size")
        spec = MoeSpec(num_experts, num_chosen, size, 0, True, (True,) * num_layers)
        if family == "mixtral":
            return spec
        swiglu = ClampedSwiglu(
            number(config, "swiglu_alpha", 1.702), number(config, "swiglu_limit", 7.0)
        )
        return replace(spec, biased=True, swiglu=swiglu)
    has_shared = family == "qwen2_moe"
    return MoeSpec(
        num_experts,
        num_chosen,
        _count(config, "moe_intermediate_size"),
        _count(config, "shared_expert_intermediate_size") if has_shared else 0,
        bool(config.get("norm_topk_prob", False)),
        _sparse_layers(config, num_layers),
    )


def _sparse_layers(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """Every so-many-th layer, but for those that are named."""
    step = _count({"decoder_sparse_step": 1, **config}, "decoder_sparse_step")
    dense = config.get("mlp_only_layers") or []
    return tuple((i + 1) % step == 0 and i not in dense for i in range(num_layers))


def _count(config: Mapping[str, Any], *keys: str) -> int:
    """Of the first key that is there."""
    key = next((key for key in keys if config.get(key) is not None), keys[0])
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {key} must be an integer >= 1, not {value!r}")
    return value
