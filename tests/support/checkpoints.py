"""Makes small random checkpoints of every family, by transformers, and asks it for the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.paths import DEMO_MODEL

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
THETA = 10000.0


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint to make: a transformers config class, what differs from SIZES, and a seed."""

    name: str
    config_class: str
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    shard_size: str = "1GB"

    def __str__(self) -> str:
        return self.name


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": THETA, **parameters}}


def tiny_model(model: TinyModel, directory: Path) -> Any:
    """The transformers model; saved to `directory / model.name`."""
    import transformers

    config = getattr(transformers, model.config_class)(**{**SIZES, **model.config})
    torch.manual_seed(model.seed)
    built = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    built = built.to(torch.float32).eval()
    randomise(built, model.seed)
    built.save_pretrained(directory / model.name, max_shard_size=model.shard_size)
    return built


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough for attention to matter; biases and norms that are not neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif name.endswith("sinks"):  # beside scores, of which there are a few dozen
                parameter.copy_(2.0 + noise)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)


def prompts(num: int, lengths: Sequence[int], vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, vocab_size, (lengths[i % len(lengths)],), generator=generator).tolist()
        for i in range(num)
    ]


def reference_logprobs(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities [num_tokens, vocab] after each token, by one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return torch.as_tensor(logits).float().log_softmax(dim=-1)


def add_tokenizer(model: Path) -> None:
    """The demo model's, for a gateway."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((DEMO_MODEL / name).read_bytes())
