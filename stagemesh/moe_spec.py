"""What a mixture of experts is: the meaning of those keys of config.json.

Covers Mixtral, Qwen2-MoE and Qwen3-MoE: a softmax over all experts, of which a token's likeliest
few are taken. Knows neither tensors nor files of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stagemesh.errors import CheckpointError

_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """`num_chosen` of `num_experts` experts take each token, in those layers that are `sparse`.

    `intermediate_size` is that of one expert, `shared_size` that of the expert that takes every
    token, 0 where there is none. `renormalised`: the weights of a token's experts sum up to one.
    """

    num_experts: int
    num_chosen: int
    intermediate_size: int
    shared_size: int
    renormalised: bool
    sparse: tuple[bool, ...]


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
    if family == "mixtral":
        size = _count(config, "intermediate_size")
        return MoeSpec(num_experts, num_chosen, size, 0, True, (True,) * num_layers)
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
