"""What a client asks for and what it gets, as plain values common to both fronts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from stagemesh.plan import SampledToken


@dataclass(frozen=True, slots=True)
class TextPrompt:
    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Used as it is: nothing is added."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Rendered with the model's template, which writes its own special tokens."""

    messages: tuple[Mapping[str, Any], ...]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """None: the model's generation_config.json, then the default of OpenAI's API."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class StoppingOptions:
    """`max_tokens` None: what the context leaves."""

    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_in_output: bool = False


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """`logprobs`, `prompt_logprobs`: number of alternatives; None for no log-probabilities."""

    logprobs: int | None = None
    echo_prompt: bool = False
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`request_id` is a label, never a key. `timeout_s` counts from when the gateway accepts; None:
    the gateway's default. `margin_s`: how much earlier waiting for an absent mesh ends.

    Requests share cached prefixes only with those of the same `cache_salt`.
    """

    prompt: Prompt
    model: str = ""
    request_id: str = ""
    sampling: SamplingOptions = SamplingOptions()
    stopping: StoppingOptions = StoppingOptions()
    output: OutputOptions = OutputOptions()
    priority: int = 0
    num_choices: int = 1
    timeout_s: float | None = None
    margin_s: float = 0.0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class PromptEcho:
    """The prompt as the model saw it.

    `logprobs` are of the tokens from the second on, empty where not asked for.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[SampledToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new; `index` is the position of the first of `tokens` in the output.

    `prompt` comes with the first delta, and only where it was asked for.
    """

    index: int
    tokens: tuple[SampledToken, ...] = ()
    text: str = ""
    prompt: PromptEcho | None = None


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Nanoseconds since the gateway accepted the request."""

    queue_ns: int
    first_token_ns: int
    total_ns: int


@dataclass(frozen=True, slots=True)
class Summary:
    """The last event of a choice; at most one of the stop causes is set."""

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    request_id: str
    seed: int
    stop_text: str | None = None
    stop_token_id: int | None = None


Event = Delta | Summary
