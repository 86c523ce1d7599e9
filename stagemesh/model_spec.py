"""What a model is: the meaning of its config.json, for one decoder with flags.

Covers the families Llama, Mistral, Qwen2 and Qwen3, and their mixtures of experts. What would
change the numbers and is not understood is an UnsupportedModel that names the key. Knows neither
tensors nor files of weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagemesh.errors import CheckpointError, UnsupportedModel
from stagemesh.moe_spec import MOE_FAMILIES, MoeSpec, parse_moe
from stagemesh.rope_spec import RopeSpec, parse_rope
from stagemesh.stored_format import StoredFormat, parse_stored_format

DTYPES = ("float32", "bfloat16", "float16")
_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
# Keys of neighbouring families that change the numbers, and the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "no_rope_layers": (None, []),
    "attention_chunk_size": (None,),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
}
# Families with one window for all layers, and what it is where the config does not say.
_ONE_WINDOW = {"mistral": 4096, "mixtral": None}
_WITHOUT_EXPERTS: dict[str, tuple[Any, ...]] = {
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0),
}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder-only model.

    `layer_windows[i]` is the sliding window of layer i in tokens, the query's own included;
    None for the whole context. `context_length` is the longest sequence that the model is meant
    for. `moe` is None where no layer has experts. `dtype` is that of the files, as the config has
    it; `stored` is how they hold weights that are quantised, None where none are.
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
    rope: RopeSpec
    layer_windows: tuple[int | None, ...]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    moe: MoeSpec | None
    tie_embeddings: bool
    dtype: str
    stored: StoredFormat | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def context_length(self) -> int:
        if self.rope.kind == "dynamic":
            return int(self.max_position * self.rope.factor)
        return self.max_position

    @property
    def dynamic_rope_length(self) -> int:
        """Length above which KV depends on a request's total length; 0 for never."""
        return self.rope.original_max_position if self.rope.kind == "dynamic" else 0

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
    architecture, family = _architecture(config)
    _refuse_unsupported(config, family)
    num_layers = _integer(config, "num_hidden_layers")
    num_heads = _integer(config, "num_attention_heads")
    hidden_size = _integer(config, "hidden_size")
    max_position = _integer(config, "max_position_embeddings")
    spec = ModelSpec(
        architecture=architecture,
        family=family,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=_integer(config, "num_key_value_heads", num_heads),
        head_dim=_integer(
            config, "head_dim", 128 if family == "qwen3" else hidden_size // num_heads
        ),
        intermediate_size=_integer(config, "intermediate_size"),
        vocab_size=_integer(config, "vocab_size"),
        max_position=max_position,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=parse_rope(config, max_position),
        layer_windows=_layer_windows(config, family, num_layers),
        qkv_bias=_has_qkv_bias(config, family),
        output_bias=_has_attention_bias(config, family),
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        moe=parse_moe(config, family, num_layers),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        dtype=_dtype(config),
        stored=parse_stored_format(config),
        eos_token_ids=_token_ids(generation, "eos_token_id") or _token_ids(config, "eos_token_id"),
        bos_token_id=next(iter(_token_ids({**config, **generation}, "bos_token_id")), None),
    )
    _check(spec)
    return spec


def _architecture(config: Mapping[str, Any]) -> tuple[str, str]:
    named = config.get("architectures") or []
    model_type = config.get("model_type")
    if not named:  # a bare config: the type decides
        named = [name for name, family in _FAMILIES.items() if family == model_type]
    name = str(named[0]) if named else ""
    if name not in _FAMILIES:
        raise UnsupportedModel(
            f"architectures: {name or model_type!r} is not supported "
            f"(known: {', '.join(_FAMILIES)})"
        )
    return name, _FAMILIES[name]


def _refuse_unsupported(config: Mapping[str, Any], family: str) -> None:
    for key in ("hidden_act", "hidden_activation"):
        if config.get(key, "silu") not in ("silu", "swish", None):
            raise UnsupportedModel(f"{key} {config[key]!r} is not supported (known: silu)")
    keys = _NEUTRAL if family in MOE_FAMILIES else {**_NEUTRAL, **_WITHOUT_EXPERTS}
    for key, neutral in keys.items():
        if config.get(key) not in neutral:
            raise UnsupportedModel(f"{key} {config[key]!r} is not supported in {family} models")


def _has_attention_bias(config: Mapping[str, Any], family: str) -> bool:
    return bool(config.get("attention_bias")) and family in ("llama", "qwen3", "qwen3_moe")


def _has_qkv_bias(config: Mapping[str, Any], family: str) -> bool:
    if family == "qwen2_moe":
        return bool(config.get("qkv_bias", True))
    return family == "qwen2" or _has_attention_bias(config, family)


def _layer_windows(
    config: Mapping[str, Any], family: str, num_layers: int
) -> tuple[int | None, ...]:
    """Llama has none, Mistral one for all layers, Qwen one for those that its config names."""
    if family == "llama":
        return (None,) * num_layers
    window = _integer(config, "sliding_window", 4096) if _has_window(config, family) else None
    types = config.get("layer_types")
    if family in _ONE_WINDOW or window is None:
        uniform = ["sliding_attention" if window else "full_attention"] * num_layers
        if types is not None and types != uniform:
            raise UnsupportedModel("layer_types: layers of both kinds are not supported here")
        return (window,) * num_layers
    if types is None:
        first = _integer(config, "max_window_layers", 28, minimum=0)
        return tuple(window if i >= first else None for i in range(num_layers))
    if len(types) != num_layers or set(types) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"layer_types {types!r} is not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _has_window(config: Mapping[str, Any], family: str) -> bool:
    if family in _ONE_WINDOW:
        return config.get("sliding_window", _ONE_WINDOW[family]) is not None
    return bool(config.get("use_sliding_window")) and config.get("sliding_window", 1) is not None


def _dtype(config: Mapping[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    name = name.removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedModel(f"dtype {name!r} is not supported (known: {', '.join(DTYPES)})")
    return name


def _check(spec: ModelSpec) -> None:
    if spec.num_heads % spec.num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {spec.num_heads} is no multiple of "
            f"num_key_value_heads {spec.num_kv_heads}"
        )
    if spec.head_dim % 2:
        raise CheckpointError(f"config.json: head_dim {spec.head_dim} is odd")
    if not spec.rms_norm_eps > 0:
        raise CheckpointError(f"config.json: rms_norm_eps {spec.rms_norm_eps} is not positive")


def _integer(
    config: Mapping[str, Any], key: str, default: int | None = None, minimum: int = 1
) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise CheckpointError(f"config.json: {key} must be an integer >= {minimum}, not {value!r}")
    return value


def _token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = config.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in ids):
        raise CheckpointError(f"{key} must be a token id or a list of them, not {value!r}")
    return tuple(dict.fromkeys(ids))


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
