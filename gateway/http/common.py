"""What completions and chats have in common: parts of requests and parts of answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from gateway.http.schemas import GenerationBody
from gateway.requests import SamplingOptions, StoppingOptions, Summary
from gateway.service import GenerationService
from stagemesh.errors import InvalidRequest

MAX_LABEL_CHARS = 256


@dataclass(frozen=True, slots=True)
class HttpContext:
    """What every route needs."""

    service: GenerationService
    max_body_bytes: int
    slow_client_timeout_s: float


def answer_id(prefix: str, request: Request, body: GenerationBody) -> str:
    """The caller's label where there is one, as far as a header can carry it, else a new one."""
    given = body.request_id or request.headers.get("x-request-id") or ""
    label = "".join(char for char in given if char.isascii() and char.isprintable())
    return f"{prefix}-{label[:MAX_LABEL_CHARS] or uuid.uuid4().hex}"


def envelope(identity: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model}


def sampling_of(body: GenerationBody) -> SamplingOptions:
    return SamplingOptions(
        temperature=body.temperature,
        top_k=0 if body.top_k == -1 else body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=_logit_bias(body.logit_bias or {}),
        seed=body.seed,
    )


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    for token_id in given:
        if not token_id.isascii() or not token_id.isdigit() or len(token_id) > 10:
            raise InvalidRequest(
                f"logit_bias: {token_id[:40]!r} is no token id", param="logit_bias"
            )
    return {int(token_id): bias for token_id, bias in given.items()}


def stopping_of(body: GenerationBody, max_tokens: int | None) -> StoppingOptions:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return StoppingOptions(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        stop=tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        include_stop_in_output=body.include_stop_str_in_output,
    )


def num_choices(body: GenerationBody) -> int:
    return 1 if body.n is None else body.n


def check_stream_options(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is for streams only", param="stream_options")


def wants_usage(body: GenerationBody) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def refuse(body: GenerationBody, names: Iterable[str]) -> None:
    """Raises InvalidRequest where one of these fields is given."""
    for name in names:
        if getattr(body, name) is not None:
            raise InvalidRequest(f"{name} is not supported", param=name)


def usage_of(summaries: Sequence[Summary], choices_per_prompt: int) -> dict[str, Any]:
    """Of all choices; a prompt counts once, however many choices it has."""
    firsts = summaries[::choices_per_prompt]
    prompt = sum(summary.usage.prompt_tokens for summary in firsts)
    cached = sum(summary.usage.cached_prompt_tokens for summary in firsts)
    completion = sum(summary.usage.completion_tokens for summary in summaries)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def ending_of(summary: Summary, eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """finish_reason, and what stopped it: a text, a token id, or None for the model's own end."""
    cause: str | int | None = summary.stop_text
    if summary.stop_token_id is not None and summary.stop_token_id not in eos_token_ids:
        cause = summary.stop_token_id
    return {"finish_reason": summary.finish_reason.value, "stop_reason": cause}


def shows(text: str, entry: Mapping[str, Any]) -> bool:
    """Whether a chunk tells its reader anything: tokens whose text is held back do not."""
    return bool(text or entry["logprobs"] or "token_ids" in entry)
