"""Makes small random LoRA adapters in PEFT's layout, and the models that they amount to."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class TinyAdapter:
    """`scaling` by hand, as the config would have it: by (layer, module) or for all."""

    name: str
    targets: Sequence[str] = ALL
    rank: int = 4
    alpha: float = 8.0
    scaling: float = 2.0
    config: dict[str, Any] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    scalings: dict[str, float] = field(default_factory=dict)
    layers: Sequence[int] | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        return self.name


def tiny_adapter(adapter: TinyAdapter, base: Any, directory: Path) -> Path:
    """Writes it for the transformers model `base`, to `directory / adapter.name`."""
    out = directory / adapter.name
    out.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somewhere",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.05,
        "target_modules": list(adapter.targets),
        "layers_to_transform": adapter.layers,
        "bias": "none",
        "inference_mode": True,
        "use_dora": False,
        "modules_to_save": None,
        **adapter.config,
    }
    (out / "adapter_config.json").write_text(json.dumps(config))
    save_file(_tensors(adapter, base), out / "adapter_model.safetensors")
    return out


def merged(adapter: TinyAdapter, base: Any) -> Any:
    """W + scaling * B A in a copy of the model: what the adapter amounts to."""
    model = copy.deepcopy(base)
    tensors = _tensors(adapter, base)
    with torch.no_grad():
        for name, module in _adapted(adapter, model):
            a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
            scaling = adapter.scalings.get(name.split(".")[-1], adapter.scaling)
            module.weight += scaling * (b @ a)
    return model


def _tensors(adapter: TinyAdapter, base: Any) -> dict[str, torch.Tensor]:
    """Large enough to change what is said, for every module alike."""
    generator = torch.Generator().manual_seed(adapter.seed)
    tensors = {}
    for name, module in _adapted(adapter, base):
        num_out, num_in = module.weight.shape
        rank = adapter.ranks.get(name.split(".")[-1], adapter.rank)
        a = torch.randn(rank, num_in, generator=generator) / num_in**0.5
        b = torch.randn(num_out, rank, generator=generator) / (4 * rank) ** 0.5
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = a.to(adapter.dtype)
        tensors[f"{prefix}.lora_B.weight"] = b.to(adapter.dtype)
    return tensors


def _adapted(adapter: TinyAdapter, model: Any) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if name.split(".")[-1] in adapter.targets
        and (adapter.layers is None or int(name.split(".")[2]) in adapter.layers)
    ]
