"""From a request to what the mesh takes: prompt ids, sampling with nothing left open, limits.

Whatever a client can get wrong is refused here, by an InvalidRequest that names the parameter.
Does not know of grpc or HTTP.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, fields, replace
from typing import Any

from gateway.model import ServedModel
from gateway.requests import (
    ChatPrompt,
    GenerationRequest,
    Prompt,
    SamplingOptions,
    StoppingOptions,
    TextPrompt,
)
from gateway.seeds import draw_seed
from stagemesh.errors import ContextLengthExceeded, InvalidRequest, RequestTooLarge
from stagemesh.sampling import MAX_SEED, SamplingSpec

MAX_STOPS = 64
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 1024
MAX_CHOICES = 128
MAX_PRIORITY = 2**31 - 1
MAX_LABEL_CHARS = 300
_MIN_PROMPT_LIMIT_CHARS = 2**20
_MAX_CHARS_PER_TOKEN = 32
# A text shorter than this is tokenised faster than handed to a thread.
_INLINE_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request with nothing left open. `prompt_text` is the prompt before tokenising, or None;
    `adapter` the identity of the one that its model's name stands for, or empty."""

    request: GenerationRequest
    prompt_token_ids: tuple[int, ...]
    prompt_text: str | None
    sampling: SamplingSpec
    max_tokens: int
    adapter: str = ""


class Preparer:
    """Tokenises in threads of `executor`, so that the event loop stays free."""

    def __init__(self, model: ServedModel, executor: Executor) -> None:
        self.model = model
        self._executor = executor

    async def prepare(self, request: GenerationRequest, max_model_len: int) -> Prepared:
        """`max_model_len`: longest prompt and output together, in tokens."""
        sampling = resolve_sampling(self.model, request)
        check_stops(request.stopping)
        if isinstance(request.prompt, TextPrompt) and not request.prompt.text:
            raise InvalidRequest("the prompt is empty", param="prompt")
        token_ids, text = await self.prompt_token_ids(request.prompt)
        self._check_prompt(token_ids, max_model_len)
        left = max_model_len - len(token_ids)
        max_tokens = min(_max_tokens(request.stopping, left), left)
        return Prepared(request, token_ids, text, sampling, max_tokens)

    async def prompt_token_ids(self, prompt: Prompt) -> tuple[tuple[int, ...], str | None]:
        """Ids and, where there was one, text of a prompt."""
        if isinstance(prompt, TextPrompt):
            text, add = prompt.text, prompt.add_special_tokens
        elif isinstance(prompt, ChatPrompt):
            text, add = await self._render(prompt), prompt.add_special_tokens
        else:
            return prompt.token_ids, None
        self._check_text(text)
        return await self._encode(text, add), text

    async def decode(self, token_ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of any tokens of the vocabulary; raises InvalidRequest for others."""
        check_token_ids("token_ids", token_ids, self.model.vocab_size)

        def decode() -> str:
            return self.model.tokenizer.decode(token_ids, skip_special=skip_special)

        if len(token_ids) <= _INLINE_CHARS:
            return decode()
        return await asyncio.get_running_loop().run_in_executor(self._executor, decode)

    async def _render(self, prompt: ChatPrompt) -> str:
        template = self.model.template()
        for message in prompt.messages:
            self._check_text(str(message.get("content", "")))

        def render() -> str:
            return template.render(
                prompt.messages,
                add_generation_prompt=prompt.add_generation_prompt,
                continue_final_message=prompt.continue_final_message,
            )

        return await asyncio.get_running_loop().run_in_executor(self._executor, render)

    async def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        def encode() -> tuple[int, ...]:
            return self.model.tokenizer.encode(text, add_special_tokens=add_special_tokens)

        if len(text) <= _INLINE_CHARS:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._executor, encode)

    def _check_text(self, text: str) -> None:
        """Before any work is done on it: a text that cannot fit the context by far."""
        limit = max(_MIN_PROMPT_LIMIT_CHARS, _MAX_CHARS_PER_TOKEN * self.model.context_length)
        if len(text) > limit:
            raise RequestTooLarge(
                f"the prompt has {len(text)} characters, at most {limit} are taken", param="prompt"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the prompt is no valid text: {error}", param="prompt") from error

    def _check_prompt(self, token_ids: Sequence[int], max_model_len: int) -> None:
        if not token_ids:
            raise InvalidRequest("the prompt is empty: it has no token", param="prompt")
        if len(token_ids) >= max_model_len:
            raise ContextLengthExceeded(
                f"the prompt has {len(token_ids)} tokens and one at least is to be generated, but "
                f"prompt and output together can have {max_model_len}",
                param="prompt",
            )
        check_token_ids("prompt", token_ids, self.model.vocab_size)


def check_token_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{name} has token id {token_id}, outside the vocabulary [0, {vocab_size})",
                param=name,
            )


def check_shape(request: GenerationRequest) -> None:
    """What can be told before anything is done for the request. Raises InvalidRequest."""
    if not 1 <= request.num_choices <= MAX_CHOICES:
        raise InvalidRequest(
            f"n must be in [1, {MAX_CHOICES}], not {request.num_choices}", param="n"
        )
    if abs(request.priority) > MAX_PRIORITY:
        raise InvalidRequest("priority must fit 32 bits", param="priority")
    for name, text in (("request_id", request.request_id), ("cache_salt", request.cache_salt)):
        if len(text) > MAX_LABEL_CHARS:
            raise InvalidRequest(
                f"{name} has {len(text)} characters, at most {MAX_LABEL_CHARS} are taken",
                param=name,
            )


def check_stops(stopping: StoppingOptions) -> None:
    if len(stopping.stop) > MAX_STOPS:
        raise InvalidRequest(
            f"stop has {len(stopping.stop)} texts, at most {MAX_STOPS} are taken", param="stop"
        )
    for stop in stopping.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"stop has a text of {len(stop)} characters; 1 to {MAX_STOP_CHARS} are wanted",
                param="stop",
            )


def _max_tokens(stopping: StoppingOptions, left: int) -> int:
    max_tokens = left if stopping.max_tokens is None else stopping.max_tokens
    if max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, not {max_tokens}", param="max_tokens")
    if stopping.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens ({stopping.min_tokens}) is more than max_tokens ({max_tokens})",
            param="min_tokens",
        )
    return max_tokens


def resolve_sampling(model: ServedModel, request: GenerationRequest) -> SamplingSpec:
    """The request's parameters, then the model's, then OpenAI's; the seed is drawn if none came."""
    sampling, stopping, output = request.sampling, request.stopping, request.output
    given = {
        field.name: value
        for field in fields(SamplingOptions)
        if field.name != "seed" and (value := getattr(sampling, field.name)) is not None
    }
    spec = replace(
        model.default_sampling,
        **given,
        seed=draw_seed() if sampling.seed is None else _seed(sampling.seed),
        min_tokens=stopping.min_tokens,
        stop_token_ids=stop_token_ids(model, stopping),
        num_logprobs=output.logprobs,
        num_prompt_logprobs=output.prompt_logprobs,
    )
    check_token_ids("logit_bias", spec.logit_bias, model.vocab_size)
    return as_sent(spec)


def _seed(seed: int) -> int:
    """Negative seeds, which OpenAI's API allows, are taken modulo 2**64."""
    if not -(2**63) <= seed <= MAX_SEED:
        raise InvalidRequest(f"seed must fit 64 bits, not {seed}", param="seed")
    return seed & MAX_SEED


def stop_token_ids(model: ServedModel, stopping: StoppingOptions) -> tuple[int, ...]:
    """The request's stop tokens, and the model's end tokens unless they are to be ignored."""
    if len(stopping.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"stop_token_ids has {len(stopping.stop_token_ids)} ids, at most "
            f"{MAX_STOP_TOKEN_IDS} are taken",
            param="stop_token_ids",
        )
    check_token_ids("stop_token_ids", stopping.stop_token_ids, model.vocab_size)
    eos = () if stopping.ignore_eos else model.eos_token_ids
    return tuple(dict.fromkeys((*stopping.stop_token_ids, *eos)))


def as_sent(spec: SamplingSpec) -> SamplingSpec:
    """Rounded to the 32-bit floats that travel, and checked again: a top_p may have become 0."""
    rounded: dict[str, Any] = {
        field.name: _float32(value)
        for field in fields(SamplingSpec)
        if isinstance(value := getattr(spec, field.name), float)
    }
    return replace(spec, **rounded)


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])
