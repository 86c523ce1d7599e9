"""Whether a request's tokens are the greedy ones of a transformers model.

Where the smallest gap between the two likeliest tokens is at least 100 times the numerical noise
seen, no tolerance is given: the tokens are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from support.checkpoints import SIZES, TinyModel, prompts, reference_logprobs
from support.stages import Live, Wish

NUM_TOKENS = 32
MIN_MARGIN_OVER_NOISE = 100


def wishes(model: TinyModel) -> list[Wish]:
    return [Wish(p, NUM_TOKENS) for p in prompts(3, (5, 19, 40), SIZES["vocab_size"], model.seed)]


def check_greedy(
    reference: Any, live: Live, min_margin_over_noise: float = MIN_MARGIN_OVER_NOISE
) -> None:
    """Teacher-forced: where every token is transformers' choice after the ones before it, the whole
    is its greedy continuation.
    """
    assert len(live.sampled) == live.wish.max_tokens
    expected = reference_logprobs(reference, live.tokens)[len(live.wish.prompt) - 1 : -1]
    top = expected.topk(2, dim=-1)
    ids = torch.tensor([token.token_id for token in live.sampled])
    logprobs = torch.tensor([token.logprob for token in live.sampled])
    noise = float((logprobs - expected.gather(1, ids[:, None])[:, 0]).abs().max())
    margin = float((top.values[:, 0] - top.values[:, 1]).min())
    assert margin >= min_margin_over_noise * noise, f"margin {margin}, noise {noise}: other seed"
    assert ids.tolist() == top.indices[:, 0].tolist()
    assert noise < 1e-4
