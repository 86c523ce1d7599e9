"""Public protobuf messages to and from the gateway's plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gateway.model import SAMPLING_NUMBERS, ServedModel
from gateway.requests import (
    ChatPrompt,
    Delta,
    Event,
    FinishReason,
    GenerationRequest,
    OutputOptions,
    Prompt,
    PromptEcho,
    SamplingOptions,
    StoppingOptions,
    Summary,
    TextPrompt,
    TokenPrompt,
)
from gateway.token_text import TokenText
from protos import text_generation_pb2 as pb
from stagemesh.errors import InvalidRequest
from stagemesh.plan import SampledToken

_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


def margin_s(timeout_s: float | None) -> float:
    """A client whose call times out by its own clock hears no reason: that the mesh is away it is
    told before, by a quarter of a second, or a tenth of a short time.

    On the wire gRPC rounds the time of a call up to three digits, which is added.
    """
    if timeout_s is None or timeout_s <= 0:
        return 0.0
    rounding_s: float = 10.0 ** (math.floor(math.log10(timeout_s)) - 2)
    return min(timeout_s / 10, 0.25 + rounding_s)


def request_from_proto(
    message: pb.GenerateRequest, request_id: str, timeout_s: float | None
) -> GenerationRequest:
    """Raises InvalidRequest where there is no prompt."""
    return GenerationRequest(
        prompt=_prompt(message),
        model=message.model,
        request_id=message.request_id or request_id,
        sampling=_sampling(message.sampling),
        stopping=_stopping(message.stopping),
        output=OutputOptions(
            logprobs=_optional(message.output, "logprobs"),
            echo_prompt=message.output.echo_prompt,
            prompt_logprobs=_optional(message.output, "prompt_logprobs"),
        ),
        priority=message.priority,
        timeout_s=timeout_s,
        margin_s=margin_s(timeout_s),
    )


def _prompt(message: pb.GenerateRequest) -> Prompt:
    kind = message.WhichOneof("prompt")
    if kind == "token_ids":
        return TokenPrompt(tuple(message.token_ids.ids))
    return text_prompt(message, add_special_tokens=None)


def text_prompt(
    message: pb.GenerateRequest | pb.TokenizeRequest, add_special_tokens: bool | None
) -> Prompt:
    """The prompt that is a text or a chat; raises InvalidRequest where there is neither."""
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return TextPrompt(message.text, add_special_tokens is not False)
    if kind == "chat":
        return _chat(message.chat, bool(add_special_tokens))
    raise InvalidRequest("there is no prompt", param="prompt")


def _chat(chat: pb.ChatPrompt, add_special_tokens: bool) -> ChatPrompt:
    add = _optional(chat, "add_generation_prompt")
    return ChatPrompt(
        messages=tuple({"role": m.role, "content": m.content} for m in chat.messages),
        add_generation_prompt=not chat.continue_final_message if add is None else add,
        continue_final_message=chat.continue_final_message,
        add_special_tokens=add_special_tokens,
    )


def _optional(message: Any, name: str) -> Any:
    """The field's value, None where it is absent."""
    return getattr(message, name) if message.HasField(name) else None


def _sampling(message: pb.SamplingParams) -> SamplingOptions:
    return SamplingOptions(
        **{name: _optional(message, name) for name in SAMPLING_NUMBERS},
        logit_bias=dict(message.logit_bias),
        seed=_optional(message, "seed"),
    )


def _stopping(message: pb.StoppingCriteria) -> StoppingOptions:
    return StoppingOptions(
        max_tokens=_optional(message, "max_tokens"),
        min_tokens=message.min_tokens,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop_in_output=message.include_stop_in_output,
    )


def event_to_proto(
    event: Event, token_text: TokenText, output: OutputOptions
) -> pb.GenerateResponse:
    if isinstance(event, Summary):
        return pb.GenerateResponse(summary=_summary(event))
    return pb.GenerateResponse(delta=_delta(event, token_text, output))


def _delta(delta: Delta, token_text: TokenText, output: OutputOptions) -> pb.TokenDelta:
    message = pb.TokenDelta(
        index=delta.index,
        token_ids=[token.token_id for token in delta.tokens],
        text=delta.text,
    )
    if output.logprobs is not None:
        message.logprobs.extend(_logprobs(delta.tokens, token_text))
    if delta.prompt is not None:
        message.prompt.CopyFrom(_echo(delta.prompt, token_text, output))
    return message


def _echo(echo: PromptEcho, token_text: TokenText, output: OutputOptions) -> pb.PromptEcho:
    message = pb.PromptEcho(token_ids=echo.token_ids, text=echo.text)
    if output.prompt_logprobs is not None:
        message.logprobs.append(pb.TokenLogprobs())  # nothing comes before the first token
        message.logprobs.extend(_logprobs(echo.logprobs, token_text))
    return message


def _logprobs(tokens: Sequence[SampledToken], token_text: TokenText) -> list[pb.TokenLogprobs]:
    def one(token_id: int, logprob: float) -> pb.TokenLogprob:
        return pb.TokenLogprob(
            token_id=token_id, logprob=logprob, text=token_text.text_of(token_id)
        )

    return [
        pb.TokenLogprobs(
            chosen=one(token.token_id, token.logprob or 0.0),
            alternatives=[one(*alternative) for alternative in token.alternatives],
        )
        for token in tokens
    ]


def _summary(summary: Summary) -> pb.GenerationSummary:
    return pb.GenerationSummary(
        finish_reason=_FINISH_REASONS[summary.finish_reason],
        usage=pb.Usage(
            prompt_tokens=summary.usage.prompt_tokens,
            completion_tokens=summary.usage.completion_tokens,
            cached_prompt_tokens=summary.usage.cached_prompt_tokens,
        ),
        timings=pb.Timings(
            queue_ns=summary.timings.queue_ns,
            first_token_ns=summary.timings.first_token_ns,
            total_ns=summary.timings.total_ns,
        ),
        request_id=summary.request_id,
        seed=summary.seed,
        stop_text=summary.stop_text,
        stop_token_id=summary.stop_token_id,
    )


def model_to_proto(model: ServedModel, identity: str, max_model_len: int) -> pb.GetModelResponse:
    defaults = {name: getattr(model.default_sampling, name) for name in SAMPLING_NUMBERS}
    return pb.GetModelResponse(
        model=model.name,
        identity=identity,
        vocab_size=model.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=model.eos_token_ids,
        has_chat_template=model.chat_template is not None,
        default_sampling=pb.SamplingParams(**defaults),
    )
