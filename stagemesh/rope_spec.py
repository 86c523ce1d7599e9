"""What a model's config says of its rotary embedding, in both forms that configs come in.

The older form has `rope_theta` and `rope_scaling` side by side, the newer one `rope_parameters`
with everything in it. Knows nothing of tensors: `stage_worker.rope` turns this into angles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stagemesh.errors import CheckpointError, UnsupportedModel

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
_KNOWN_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "partial_rotary_factor",
}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Parameters of one kind of rotary embedding; those that the kind does not use are neutral.

    `attention_factor` multiplies cosine and sine. `original_max_position` is the context that the
    model was trained with before it was stretched.
    """

    kind: str
    theta: float
    original_max_position: int
    factor: float = 1.0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def parse_rope(config: Mapping[str, Any], max_position: int) -> RopeSpec:
    """The rope of a parsed config.json; raises UnsupportedModel naming the key."""
    parameters = _parameters(config)
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    if kind not in KINDS:
        raise UnsupportedModel(f"rope_type {kind!r} is not supported (known: {', '.join(KINDS)})")
    _refuse_unknown(parameters)
    original = (
        config.get("original_max_position_embeddings")
        or parameters.get("original_max_position_embeddings")
        or max_position
    )
    if kind == "dynamic":  # scales from the context it is configured with, whatever else is said
        original = max_position
    factor = _factor(kind, parameters, max_position / original)
    return RopeSpec(
        kind=kind,
        theta=_number(parameters, "rope_theta", config.get("rope_theta", 10000.0)),
        original_max_position=int(original),
        factor=factor,
        attention_factor=_attention_factor(parameters, factor) if kind == "yarn" else 1.0,
        low_freq_factor=_number(parameters, "low_freq_factor", 1.0),
        high_freq_factor=_number(parameters, "high_freq_factor", 4.0),
        beta_fast=_number(parameters, "beta_fast", 32.0),
        beta_slow=_number(parameters, "beta_slow", 1.0),
        truncate=bool(parameters.get("truncate", True)),
    )


def _parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    merged = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    for key, value in merged.items():
        if isinstance(value, Mapping):
            raise UnsupportedModel(f"rope_parameters[{key!r}]: rope per kind of layer")
    partial = merged.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial is not None and partial != 1.0:
        raise UnsupportedModel(f"partial_rotary_factor {partial}: only whole heads are rotated")
    return merged


def _refuse_unknown(parameters: Mapping[str, Any]) -> None:
    for key, value in parameters.items():
        if key not in _KNOWN_KEYS and value is not None:
            raise UnsupportedModel(f"rope parameter {key!r} is not supported")


def _factor(kind: str, parameters: Mapping[str, Any], ratio: float) -> float:
    if kind == "default":
        return 1.0
    if parameters.get("factor") is None:
        if kind == "yarn":
            return ratio
        raise CheckpointError(f"config.json: rope of kind {kind!r} lacks its factor")
    return _number(parameters, "factor", 1.0)


def _attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    """How YaRN makes up for flatter attention (arXiv 2309.00071, section 3.4)."""
    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor", 1.0)
    numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if numerator and denominator:
        return _mscale(factor, float(numerator)) / _mscale(factor, float(denominator))
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _number(parameters: Mapping[str, Any], key: str, default: float) -> float:
    value = parameters.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"config.json: {key} must be a positive number, not {value!r}")
    return float(value)
