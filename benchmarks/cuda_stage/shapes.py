"""Shapes of models to measure, and checkpoints of them with random weights, made on the device.

    E hidden size, I intermediate size, V vocabulary

What such a model says is of no matter; what it reads and multiplies is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from stage_worker.layout import Shape, all_parts, part_tensors
from stagemesh.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    rope_theta: float = 500000.0
    max_tokens: int = 131072


SHAPES = {
    "8b": ModelShape(32, 4096, 14336, 32, 8, 128256),
    "1b": ModelShape(16, 2048, 8192, 32, 8, 128256),
    "tiny": ModelShape(4, 256, 512, 8, 2, 1024, max_tokens=16384),
}


def make_checkpoint(out: Path, shape: ModelShape, device: torch.device) -> int:
    """Writes a bfloat16 checkpoint, a file a part; its bytes."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(_config(shape)) + "\n")
    spec = ModelSpec.from_directory(out)
    generator = torch.Generator(device).manual_seed(0)
    file_of, num_bytes = {}, 0
    for part in all_parts(spec):
        tensors = part_tensors(spec, part)
        file_of.update(dict.fromkeys(tensors, f"{part}.safetensors"))
        made = {name: _random(size, generator) for name, size in tensors.items()}
        save_file(made, out / f"{part}.safetensors")
        num_bytes += sum(tensor.nbytes for tensor in made.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": file_of}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return num_bytes


def _random(size: Shape, generator: torch.Generator) -> Tensor:
    tensor = torch.ones(size, dtype=torch.bfloat16, device=generator.device)
    if len(size) > 1:
        tensor.normal_(std=size[-1] ** -0.5, generator=generator)
    return tensor.cpu()


def _config(shape: ModelShape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_tokens,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
