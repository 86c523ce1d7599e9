"""Makes a checkpoint with random weights and a long context: what the model says is of no matter.

A Llama in the Hugging Face layout, with the tokenizer of the demo model. The weights are large
enough for attention to matter, so that a wrong page would change what is said. Large models are
written a piece at a time.

    python -m benchmarks.recovery.random_model /tmp/long-llama --layers 8 --hidden 256
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.recovery.part import REPO

TOKENIZER = REPO / "models" / "demo"
TOKENIZER_SIZE = 2048
_MAX_SHARD_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class ModelShape:
    num_layers: int = 8
    hidden_size: int = 256
    intermediate_size: int = 768
    num_heads: int = 8
    num_kv_heads: int = 4
    max_tokens: int = 8192
    vocab_size: int = TOKENIZER_SIZE
    # One matrix for embedding and head.
    tied: bool = True
    # Of what the files hold: float32 or float16.
    stored: str = "float32"

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_bytes_per_token(self) -> int:
        """Of one layer, in float32."""
        return 2 * self.num_kv_heads * self.head_size * 4

    @property
    def log_bytes_per_token(self) -> int:
        """Of one boundary between stages, in float32."""
        return self.hidden_size * 4

    @property
    def stored_bytes(self) -> int:
        """Of all matrices."""
        dtype: torch.dtype = getattr(torch, self.stored)
        return dtype.itemsize * self.num_parameters()

    def num_parameters(self) -> int:
        return sum(rows * columns for rows, columns in _matrices(self).values())


def make(out: Path, shape: ModelShape, seed: int = 0) -> None:
    """Its tokenizer knows the first ids only, where the shape has a larger vocabulary."""
    out.mkdir(parents=True, exist_ok=True)
    shards = _planned_shards(shape)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, sizes in enumerate(shards):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        dtype = getattr(torch, shape.stored)
        weights = {key: _weight(size, generator).to(dtype) for key, size in sizes.items()}
        save_file(weights, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": shape.stored_bytes}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (out / "config.json").write_text(json.dumps(_config(shape), indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TOKENIZER / name, out / name)


def _weight(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size)
    return torch.randn(size, generator=generator).mul_(1.5 / size[1] ** 0.5)


def _planned_shards(shape: ModelShape) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled_bytes = 0
    for name, size in _tensors(shape):
        num_bytes = 4 * torch.Size(size).numel()
        if shards[-1] and filled_bytes + num_bytes > _MAX_SHARD_BYTES:
            shards.append({})
            filled_bytes = 0
        shards[-1][name] = size
        filled_bytes += num_bytes
    return shards


def _tensors(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _matrices(shape).items()
    for n in range(shape.num_layers):
        for name in _NORMS:
            yield f"model.layers.{n}.{name}_layernorm.weight", (shape.hidden_size,)
    yield "model.norm.weight", (shape.hidden_size,)


_NORMS = ("input", "post_attention")


def _matrices(shape: ModelShape) -> dict[str, tuple[int, int]]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    sizes = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    if not shape.tied:
        sizes["lm_head.weight"] = (shape.vocab_size, hidden)
    for n in range(shape.num_layers):
        layer = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        sizes |= {f"model.layers.{n}.{name}.weight": size for name, size in layer.items()}
    return sizes


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
        "head_dim": shape.head_size,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": shape.stored,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = ModelShape(
        num_layers=args.layers, hidden_size=args.hidden, intermediate_size=3 * args.hidden
    )
    make(args.out, shape, args.seed)
    print(f"{args.out}: {shape.num_parameters() / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
