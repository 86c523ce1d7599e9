"""What an adapter_config.json of PEFT says: which matrices are changed, and how much.

Whatever would change numbers and is not known here is an error that names the key.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagemesh.adapters import CONFIG
from stagemesh.errors import CheckpointError, UnsupportedModel

# Of training, of where it came from, or of what is done at other times than this.
_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "peft_version"),
        *("inference_mode", "loftq_config", "lora_dropout", "megatron_config", "megatron_core"),
        *("peft_type", "qalora_group_size", "revision", "runtime_config", "task_type"),
    }
)
# The weights of the model stay as they are: others are trained against weights that were changed.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_UNDERSTOOD = frozenset(
    {
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
        *("exclude_modules", "layers_to_transform", "layers_pattern", "bias", "init_lora_weights"),
    }
)

Modules = str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """`targets` and `excluded`: names of modules or ends of them, or one pattern of whole names.
    `layers` None: all. Patterns map ends of names to what holds there instead."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: Modules
    excluded: Modules
    layers: tuple[int, ...] | None

    @classmethod
    def from_directory(cls, directory: Path) -> AdapterConfig:
        """Raises CheckpointError, UnsupportedModel."""
        path = directory / CONFIG
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("it is no object")
            _check_supported(path, content)
            return cls._read(content)
        except (OSError, ValueError, KeyError, TypeError, re.error) as error:
            raise CheckpointError(f"{path} cannot be read: {error!r}") from error

    @classmethod
    def _read(cls, content: Mapping[str, Any]) -> AdapterConfig:
        layers = content.get("layers_to_transform")
        config = cls(
            rank=int(content["r"]),
            alpha=float(content["lora_alpha"]),
            use_rslora=bool(content.get("use_rslora")),
            rank_pattern={k: int(v) for k, v in (content.get("rank_pattern") or {}).items()},
            alpha_pattern={k: float(v) for k, v in (content.get("alpha_pattern") or {}).items()},
            targets=_modules(content["target_modules"]),
            excluded=_modules(content.get("exclude_modules") or ()),
            layers=None if layers is None else _layers(layers),
        )
        if min((config.rank, *config.rank_pattern.values())) < 1:
            raise ValueError("a rank is less than 1")
        return config

    def changes(self, module: str, layer: int) -> bool:
        """Whether the module of this whole name, a part of this layer, is one that it adapts."""
        if self.layers is not None and layer not in self.layers:
            return False
        return _matches(self.targets, module) and not _matches(self.excluded, module)

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_pattern_of(module, self.rank_pattern), self.rank)

    def scaling(self, module: str) -> float:
        """What the product of the two matrices is multiplied by."""
        alpha = self.alpha_pattern.get(_pattern_of(module, self.alpha_pattern), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _check_supported(path: Path, content: Mapping[str, Any]) -> None:
    if str(content.get("peft_type", "LORA")).upper() != "LORA":
        raise UnsupportedModel(f"{path}: peft_type {content['peft_type']} is not supported")
    if content.get("bias") not in (None, "none"):
        raise UnsupportedModel(f"{path}: bias {content['bias']!r} is not supported")
    init = content.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise UnsupportedModel(f"{path}: init_lora_weights {init!r} is not supported")
    if content.get("layers_pattern") not in (None, "layers", [], ["layers"]):
        raise UnsupportedModel(
            f"{path}: layers_pattern {content['layers_pattern']!r} is not supported"
        )
    for key, value in content.items():
        # A key that is new to us is one that says nothing, or we could not know what it changes.
        if key not in _WITHOUT_EFFECT | _UNDERSTOOD and value:
            raise UnsupportedModel(f"{path}: {key} is not supported (it is {value!r})")


def _modules(given: Any) -> Modules:
    if isinstance(given, str):
        return r".*\.layers\..*" if given == "all-linear" else re.compile(given).pattern
    return tuple(sorted(str(name) for name in given))


def _layers(given: Any) -> tuple[int, ...]:
    return (given,) if isinstance(given, int) else tuple(sorted(int(layer) for layer in given))


def _matches(modules: Modules, name: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == each or name.endswith("." + each) for each in modules)


def _pattern_of(module: str, patterns: Mapping[str, object]) -> str:
    """The first pattern that is an end of the name; the name itself where none is."""
    for pattern in patterns:
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return pattern
    return module
