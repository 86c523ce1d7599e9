"""Small mixtures of experts, and routers that have favourites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support.checkpoints import SIZES, TinyModel, prompts, reference_logprobs, tiny_model
from support.stages import Live, Wish

MIXTURE = TinyModel(
    "experts",
    "Qwen3MoeConfig",
    {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
        "head_dim": 16,
    },
    3,
)
NUM_TOKENS = 12


def wishes(num: int) -> list[Wish]:
    return [Wish(p, NUM_TOKENS) for p in prompts(num, (5, 19, 40), SIZES["vocab_size"], 1)]


def greedy_after(reference: Any, prompt: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """What the reference would say in place of each of these tokens."""
    logprobs = reference_logprobs(reference, [*prompt, *tokens])[len(prompt) - 1 : -1]
    return list(logprobs.argmax(dim=-1).tolist())


def greedy_tokens(reference: Any, live: Live) -> list[int]:
    prompt = live.wish.prompt
    return greedy_after(reference, prompt, live.tokens[len(prompt) :])


def sampled(live: Live) -> list[int]:
    return [token.token_id for token in live.sampled]


def skewed_model(directory: Path) -> tuple[Any, Path]:
    """All tokens go to experts 1 and 2 of every layer."""
    skewed = replace(MIXTURE, config={**MIXTURE.config, "num_experts_per_tok": 1})
    reference = tiny_model(skewed, directory)
    with torch.no_grad():
        for layer in reference.model.layers:
            if hasattr(layer.mlp, "experts"):
                # One of the two scores is positive, whatever the token is, and all others are zero.
                scores = layer.mlp.gate.weight
                scores[[0, 3, 4, 5]] = 0.0
                scores[2] = -scores[1]
    reference.save_pretrained(directory / MIXTURE.name)
    return reference, directory / MIXTURE.name
