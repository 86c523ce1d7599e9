"""What a model is: the meaning of its config.json, for one decoder with flags.

Which families there are, and what each looks at, is in `stagemesh.families`. What would change the
numbers and is not understood is an UnsupportedModel that names the key. Knows neither tensors nor
files of weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagemesh.config_values import integer, number, token_ids
from stagemesh.errors import CheckpointError, UnsupportedModel
from stagemesh.families import Norms, Scales, find_family, has_qkv_bias, parse_scales
from stagemesh.layer_kinds import layer_ropes, layer_windows
from stagemesh.moe_spec import MoeSpec, parse_moe
from stagemesh.rope_spec import RopeSpec
from stagemesh.stored_format import MXFP4_BLOCK, StoredFormat, parse_stored_format

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder-only model.

    `layer_windows[i]` is the sliding window of layer i in tokens, the query's own included;
    None for the whole context; `layer_ropes[i]` says which of `ropes` it has, None for none: the
    first of them is that of layers that see everything. `context_length` is the longest sequence
    that the model is meant for. `moe` is None where no layer has experts. `dtype` is that of the
    files, as the config has it; `stored` is how they hold weights that are quantised, None where
    none are.
    """

    architecture: str
    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    ropes: tuple[RopeSpec, ...]
    layer_ropes: tuple[int | None, ...]
    layer_windows: tuple[int | None, ...]
    norms: Norms
    scales: Scales
    activation: str
    sinks: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    moe: MoeSpec | None
    tie_embeddings: bool
    dtype: str
    stored: StoredFormat | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def rope(self) -> RopeSpec:
        return self.ropes[0]

    @property
    def qk_norm(self) -> bool:
        return self.norms.heads or self.norms.projections

    @property
    def context_length(self) -> int:
        if self.rope.kind == "dynamic":
            return int(self.max_position * self.rope.factor)
        return self.max_position

    @property
    def dynamic_rope_length(self) -> int:
        """Length above which KV depends on a request's total length; 0 for never."""
        return self.rope.original_max_position if self.rope.depends_on_length else 0

    @property
    def sliding_window(self) -> int | None:
        """The one window of the model, where every layer has it."""
        windows = set(self.layer_windows)
        return windows.pop() if len(windows) == 1 else None

    @classmethod
    def from_directory(cls, path: Path) -> ModelSpec:
        """Reads config.json and generation_config.json.

        Raises CheckpointError where they are missing or wrong, UnsupportedModel naming the key.
        """
        config = _read_json(path / "config.json")
        generation_path = path / "generation_config.json"
        generation = _read_json(generation_path) if generation_path.exists() else {}
        return parse_config(config, generation)


def parse_config(config: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelSpec:
    """The spec of a parsed config.json and generation_config.json; errors as `from_directory`."""
    architecture, family = find_family(config)
    num_layers = integer(config, "num_hidden_layers")
    num_heads = integer(config, "num_attention_heads")
    hidden_size = integer(config, "hidden_size")
    max_position = integer(config, "max_position_embeddings")
    attention_bias = family.attention_bias and bool(
        config.get("attention_bias", family.has_attention_bias)
    )
    windows = layer_windows(config, family, num_layers)
    ropes, rope_of_layer = layer_ropes(config, family, windows, max_position)
    spec = ModelSpec(
        architecture=architecture,
        family=family.name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=integer(config, "num_key_value_heads", num_heads),
        head_dim=integer(config, "head_dim", family.head_dim or hidden_size // num_heads),
        intermediate_size=integer(config, "intermediate_size"),
        vocab_size=integer(config, "vocab_size"),
        max_position=max_position,
        rms_norm_eps=number(config, "rms_norm_eps", family.rms_norm_eps),
        ropes=ropes,
        layer_ropes=rope_of_layer,
        layer_windows=windows,
        norms=family.norms,
        scales=parse_scales(config, family, hidden_size),
        activation=family.activation,
        sinks=family.sinks,
        qkv_bias=has_qkv_bias(config, family) or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family.mlp_bias and bool(config.get("mlp_bias", False)),
        moe=parse_moe(config, family.name, num_layers),
        tie_embeddings=bool(config.get("tie_word_embeddings", family.tie_embeddings)),
        dtype=_dtype(config),
        stored=parse_stored_format(config),
        eos_token_ids=token_ids(generation, "eos_token_id") or token_ids(config, "eos_token_id"),
        bos_token_id=next(iter(token_ids({**config, **generation}, "bos_token_id")), None),
    )
    _check(spec)
    return spec


def _dtype(config: Mapping[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    name = name.removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedModel(f"dtype {name!r} is not supported (known: {', '.join(DTYPES)})")
    return name


def _check(spec: ModelSpec) -> None:
    _check_mxfp4(spec)
    if spec.num_heads % spec.num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {spec.num_heads} is no multiple of "
            f"num_key_value_heads {spec.num_kv_heads}"
        )
    for rope in spec.ropes:
        rotated = rope.rotated_dims(spec.head_dim)
        if rotated % 2 or not 0 < rotated <= spec.head_dim:
            share = "" if rope.share == 1.0 else f" and partial_rotary_factor {rope.share}"
            raise CheckpointError(
                f"config.json: head_dim {spec.head_dim}{share}: {rotated} dimensions cannot be "
                "rotated in pairs"
            )
        for key, factors in (
            ("short_factor", rope.short_factors),
            ("long_factor", rope.long_factors),
        ):
            if factors and len(factors) != rotated // 2:
                raise CheckpointError(
                    f"config.json: {key} has {len(factors)} numbers for {rotated // 2} frequencies"
                )


def _check_mxfp4(spec: ModelSpec) -> None:
    if spec.stored is None or not spec.stored.is_mxfp4:
        return
    if spec.family != "gpt_oss":
        raise UnsupportedModel(
            f"quantization_config: quant_method 'mxfp4' is not supported in {spec.family} models"
        )
    for key, size in (
        ("hidden_size", spec.hidden_size),
        ("intermediate_size", spec.intermediate_size),
    ):
        if size % MXFP4_BLOCK:
            raise CheckpointError(
                f"config.json: {key} {size} is no multiple of mxfp4's blocks of {MXFP4_BLOCK}"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value
