"""What differs from layer to layer of a model: sliding windows and rotary embeddings.

Knows neither tensors nor files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stagemesh.config_values import integer, number
from stagemesh.errors import CheckpointError, UnsupportedModel
from stagemesh.families import Family
from stagemesh.rope_spec import RopeSpec, parse_rope

SLIDING = "sliding_attention"
FULL = "full_attention"
Windows = tuple[int | None, ...]
Ropes = tuple[tuple[RopeSpec, ...], tuple[int | None, ...]]
"""The rotary embeddings of a model, and which of them each layer has; None for none."""

# Every how many layers one has the whole context, where the config does not name the layers.
_PATTERNS = {"gemma2": 2, "gemma3_text": 6, "gpt_oss": 2}
# What transformers takes of GPT-OSS where the config says nothing.
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def layer_windows(config: Mapping[str, Any], family: Family, num_layers: int) -> Windows:
    """The sliding window of each layer; raises UnsupportedModel, CheckpointError naming the key."""
    match family.name:
        case "mistral":
            return _one_window(config, num_layers, 4096)
        case "phi3" | "mixtral":
            return _one_window(config, num_layers, None)
        case "qwen2" | "qwen3" | "qwen2_moe" | "qwen3_moe":
            return _qwen_windows(config, num_layers)
        case "gemma2" | "gemma3_text":
            return _alternating_windows(config, family, num_layers, 4096)
        case "gpt_oss":
            return _alternating_windows(config, family, num_layers, 128)
        case "smollm3":
            return _smollm3_windows(config, num_layers)
    return (None,) * num_layers


def layer_ropes(
    config: Mapping[str, Any], family: Family, windows: Windows, max_position: int
) -> Ropes:
    """Raises UnsupportedModel, CheckpointError naming the key."""
    everywhere = (0,) * len(windows)
    match family.name:
        case "phi3":
            return (_phi3_rope(config, max_position),), everywhere
        case "gemma3_text":
            ropes = _gemma3_ropes(config, max_position)
            return ropes, tuple(0 if window is None else 1 for window in windows)
        case "smollm3":
            rope = parse_rope(config, max_position, default_theta=2e6)
            rotated = _rotated_layers(config, len(windows))
            return (rope,), tuple(0 if rotates else None for rotates in rotated)
        case "gpt_oss":
            if not config.get("rope_parameters") and not config.get("rope_scaling"):
                config = {**config, "rope_scaling": _GPT_OSS_ROPE}
            return (parse_rope(config, max_position, default_theta=150000.0),), everywhere
    return (parse_rope(config, max_position),), everywhere


def _one_window(config: Mapping[str, Any], num_layers: int, default: int | None) -> Windows:
    """The same for all layers, or none."""
    has_window = config.get("sliding_window", default) is not None
    window = integer(config, "sliding_window", default) if has_window else None
    types = config.get("layer_types")
    if types is not None and types != [SLIDING if window else FULL] * num_layers:
        raise UnsupportedModel("layer_types: layers of both kinds are not supported here")
    return (window,) * num_layers


def _qwen_windows(config: Mapping[str, Any], num_layers: int) -> Windows:
    if not config.get("use_sliding_window") or config.get("sliding_window", 1) is None:
        return (None,) * num_layers
    window = integer(config, "sliding_window", 4096)
    if config.get("layer_types") is None:
        first = integer(config, "max_window_layers", 28, minimum=0)
        return tuple(window if i >= first else None for i in range(num_layers))
    return tuple(window if sliding else None for sliding in _slides(config, num_layers))


def _alternating_windows(
    config: Mapping[str, Any], family: Family, num_layers: int, default: int
) -> Windows:
    if config.get("sliding_window", default) is None:
        raise UnsupportedModel(f"sliding_window None is not supported in {family.name} models")
    window = integer(config, "sliding_window", default)
    if config.get("layer_types") is None:
        pattern = _PATTERNS[family.name]
        if family.name == "gemma3_text":
            pattern = integer(config, "sliding_window_pattern", pattern)
        return tuple(window if (i + 1) % pattern else None for i in range(num_layers))
    return tuple(window if sliding else None for sliding in _slides(config, num_layers))


def _smollm3_windows(config: Mapping[str, Any], num_layers: int) -> Windows:
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return (None,) * num_layers
    window = integer(config, "sliding_window")
    if config.get("layer_types") is None:  # those without rotation have it
        rotated = _rotated_layers(config, num_layers)
        return tuple(None if rotates else window for rotates in rotated)
    return tuple(window if sliding else None for sliding in _slides(config, num_layers))


def _slides(config: Mapping[str, Any], num_layers: int) -> list[bool]:
    types = config["layer_types"]
    if len(types) != num_layers or set(types) - {FULL, SLIDING}:
        raise UnsupportedModel(f"layer_types {types!r} is not supported")
    return [kind == SLIDING for kind in types]


def _rotated_layers(config: Mapping[str, Any], num_layers: int) -> list[bool]:
    """`no_rope_layers` has a 1 for every layer that does rotate, whatever its name says."""
    given = config.get("no_rope_layers")
    if given is None:
        interval = integer(config, "no_rope_layer_interval", 4)
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    if not isinstance(given, list) or len(given) < num_layers or set(given) - {0, 1}:
        raise CheckpointError(
            f"config.json: no_rope_layers must be a 0 or 1 for each layer, not {given!r}"
        )
    return [bool(one) for one in given[:num_layers]]


def _phi3_rope(config: Mapping[str, Any], max_position: int) -> RopeSpec:
    told = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = told.pop("rope_type", None) or told.pop("type", None) or "default"
    told.pop("type", None)
    if kind in ("su", "yarn"):  # as older files call it
        kind = "longrope"
    if kind not in ("default", "longrope"):
        raise UnsupportedModel(f"rope_type {kind!r} is not supported in phi3 models")
    told["rope_type"] = kind
    told.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    renamed = {**config, "rope_parameters": told, "rope_scaling": None}
    return parse_rope(renamed, max_position, allows_partial=True)


def _gemma3_ropes(config: Mapping[str, Any], max_position: int) -> tuple[RopeSpec, RopeSpec]:
    """Of layers that see everything, and of those with a window: neither form of config is that of
    other families."""
    told = config.get("rope_parameters") or {}
    for key, value in told.items():
        if key not in (FULL, SLIDING) and value is not None:
            raise UnsupportedModel(f"rope_parameters: {key!r} is not supported in gemma3_text")
    stretched = {**(told.get(FULL) or {}), **(config.get("rope_scaling") or {})}
    thetas = {
        FULL: number(config, "rope_theta", 1e6),
        SLIDING: number(config, "rope_local_base_freq", 1e4),
    }
    ropes = (
        parse_rope({"rope_parameters": parameters}, max_position, default_theta=thetas[kind])
        for kind, parameters in ((FULL, stretched), (SLIDING, told.get(SLIDING) or {}))
    )
    whole, local = ropes
    for rope in (whole, local):
        if rope.kind not in ("default", "linear"):
            raise UnsupportedModel(f"rope_type {rope.kind!r} is not supported in gemma3_text")
    return whole, local
