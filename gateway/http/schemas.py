"""Bodies of requests, field by field. A field that is not here is refused by its name.

What OpenAI's API knows and this one cannot do has a field as well, so that the answer says so.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Integer = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class Body(BaseModel):
    """Strict: "5" is no number, and 1 is no truth."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # of no effect: it hides lengths by padding


class GenerationBody(Body):
    """What completions and chats share: OpenAI's, then vLLM's extensions."""

    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: Integer | None = None
    n: Integer | None = None
    presence_penalty: float | None = None
    seed: Integer | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    # Labels of the caller's own, of no effect here.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    add_special_tokens: bool | None = None
    cache_salt: str | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    min_p: float | None = None
    min_tokens: Integer = 0
    priority: Integer = 0
    prompt_logprobs: Integer | None = None
    repetition_penalty: float | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    skip_special_tokens: bool = True
    stop_token_ids: list[Integer] | None = None
    top_k: Integer | None = None


class CompletionBody(GenerationBody):
    prompt: Any = None
    best_of: Integer | None = None
    echo: bool | None = None
    logprobs: Integer | None = None
    suffix: str | None = None


class ContentPart(Body):
    type: str
    text: str | None = None


class Message(BaseModel):
    """Further fields go to the template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[ContentPart] | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    type: str


class ChatBody(GenerationBody):
    messages: list[Message]
    logprobs: bool | None = None
    max_completion_tokens: Integer | None = None
    top_logprobs: Integer | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    echo: bool = False
    response_format: ResponseFormat | None = None
    # Not supported; see UNSUPPORTED_IN_CHAT.
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: list[str] | None = None
    parallel_tool_calls: bool | None = None
    prediction: Any = None
    reasoning_effort: str | None = None
    tool_choice: Any = None
    tools: list[Any] | None = None
    verbosity: str | None = None
    web_search_options: Any = None


UNSUPPORTED_IN_CHAT = (
    *("audio", "function_call", "functions", "prediction", "reasoning_effort"),
    *("tools", "verbosity", "web_search_options"),
)


class TokenizeBody(Body):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[Integer]
