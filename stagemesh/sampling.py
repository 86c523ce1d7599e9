"""Sampling parameters with nothing left open, as they travel from the gateway to the last stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from stagemesh.errors import InvalidRequest

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How the tokens of one sequence are chosen; see SamplingParams in text_generation.proto.

    `temperature` 0 is greedy, `top_k` 0 means all, `seed` is always given. `stop_token_ids` are not
    sampled before `min_tokens`. `num_logprobs` None: no log-probabilities.

    Raises InvalidRequest, naming the parameter.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_k", self.top_k, 0, 2**31 - 1)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequest("top_p must be greater than 0", param="top_p")
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("seed", self.seed, 0, MAX_SEED)
        _check_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        for name in ("num_logprobs", "num_prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_range(name.removeprefix("num_"), value, 0, MAX_LOGPROBS)
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise InvalidRequest(
                f"logit_bias has {len(self.logit_bias)} entries, at most {MAX_LOGIT_BIASES} are "
                "taken",
                param="logit_bias",
            )
        for token_id, bias in self.logit_bias.items():
            _check_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequest(f"{name} must be in [{low:g}, {high:g}], not {value}", param=name)
