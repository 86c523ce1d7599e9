"""What a model's config says of its rotary embedding, in both forms that configs come in.

The older form has `rope_theta` and `rope_scaling` side by side, the newer one `rope_parameters`
with everything in it. Knows nothing of tensors: `stage_worker.rope` turns this into angles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stagemesh.config_values import number, numbers
from stagemesh.errors import CheckpointError, UnsupportedModel

KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
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
_LONGROPE_KEYS = {"short_factor", "long_factor"}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Parameters of one kind of rotary embedding; those that the kind does not use are neutral.

    `attention_factor` multiplies cosine and sine. `original_max_position` is the context that the
    model was trained with before it was stretched. Of a head's dimensions the first `share` are
    rotated. `short_factors` and `long_factors` divide longrope's frequencies, one by one.
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
    share: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether a request's total length decides how its positions turn."""
        return self.kind in ("dynamic", "longrope")

    def rotated_dims(self, head_dim: int) -> int:
        return int(head_dim * self.share)


def parse_rope(
    config: Mapping[str, Any],
    max_position: int,
    *,
    default_theta: float = 10000.0,
    allows_partial: bool = False,
) -> RopeSpec:
    """The rope of a parsed config.json; raises UnsupportedModel, CheckpointError naming the key."""
    parameters = _parameters(config)
    share = _share(config, parameters, allows_partial)
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    if kind not in KINDS:
        raise UnsupportedModel(f"rope_type {kind!r} is not supported (known: {', '.join(KINDS)})")
    _refuse_unknown(parameters, kind)
    original = (
        config.get("original_max_position_embeddings")
        or parameters.get("original_max_position_embeddings")
        or max_position
    )
    if kind == "dynamic":  # scales from the context it is configured with, whatever else is said
        original = max_position
    factor = _factor(kind, parameters, max_position / original)
    is_long = kind == "longrope"
    if is_long and original == max_position:
        raise CheckpointError("config.json: longrope lacks its original_max_position_embeddings")
    return RopeSpec(
        kind=kind,
        theta=number(parameters, "rope_theta", config.get("rope_theta", default_theta)),
        original_max_position=int(original),
        factor=factor,
        attention_factor=_attention_factor(kind, parameters, factor, original),
        low_freq_factor=number(parameters, "low_freq_factor", 1.0),
        high_freq_factor=number(parameters, "high_freq_factor", 4.0),
        beta_fast=number(parameters, "beta_fast", 32.0),
        beta_slow=number(parameters, "beta_slow", 1.0),
        truncate=bool(parameters.get("truncate", True)),
        share=share,
        short_factors=numbers(parameters, "short_factor") if is_long else (),
        long_factors=numbers(parameters, "long_factor") if is_long else (),
    )


def _parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    merged = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    for key, value in merged.items():
        if isinstance(value, Mapping):
            raise UnsupportedModel(f"rope_parameters[{key!r}]: rope per kind of layer")
    return merged


def _share(config: Mapping[str, Any], parameters: Mapping[str, Any], allows_partial: bool) -> float:
    told = parameters if "partial_rotary_factor" in parameters else config
    share = number(told, "partial_rotary_factor", 1.0)
    if share != 1.0 and not allows_partial:
        raise UnsupportedModel(f"partial_rotary_factor {share}: only whole heads are rotated")
    return share


def _refuse_unknown(parameters: Mapping[str, Any], kind: str) -> None:
    known = _KNOWN_KEYS | _LONGROPE_KEYS if kind == "longrope" else _KNOWN_KEYS
    for key, value in parameters.items():
        if key not in known and value is not None:
            raise UnsupportedModel(f"rope parameter {key!r} is not supported")


def _factor(kind: str, parameters: Mapping[str, Any], ratio: float) -> float:
    if kind == "default":
        return 1.0
    if parameters.get("factor") is None:
        if kind in ("yarn", "longrope"):
            return ratio
        raise CheckpointError(f"config.json: rope of kind {kind!r} lacks its factor")
    return number(parameters, "factor", 1.0)


def _attention_factor(
    kind: str, parameters: Mapping[str, Any], factor: float, original: float
) -> float:
    """How stretched models make up for flatter attention (YaRN: arXiv 2309.00071, section 3.4;
    LongRoPE: arXiv 2402.13753)."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    if parameters.get("attention_factor") is not None:
        return number(parameters, "attention_factor", 1.0)
    if kind == "longrope":
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if numerator and denominator:
        return _mscale(factor, float(numerator)) / _mscale(factor, float(denominator))
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
