"""/v1/completions: OpenAI's text completions, with vLLM's extensions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from gateway.choice import Choice
from gateway.http.common import (
    HttpContext,
    answer_id,
    check_stream_options,
    ending_of,
    envelope,
    num_choices,
    refuse,
    sampling_of,
    shows,
    stopping_of,
    usage_of,
    wants_usage,
)
from gateway.http.logprobs import LegacyLogprobs, joined, prompt_logprobs
from gateway.http.reading import read_body
from gateway.http.schemas import CompletionBody
from gateway.http.streaming import EventStream, events_of, unless_disconnected
from gateway.model import ServedModel
from gateway.requests import (
    Delta,
    Event,
    FinishReason,
    GenerationRequest,
    OutputOptions,
    Prompt,
    Summary,
    TextPrompt,
    TokenPrompt,
)
from stagemesh.errors import InvalidRequest

DEFAULT_MAX_TOKENS = 16
_KIND = "text_completion"


async def create_completion(context: HttpContext, request: Request) -> Response:
    body = await read_body(request, CompletionBody, context)
    _check(body)
    completion = _Completion(context, body, answer_id("cmpl", request, body))
    if body.stream:
        return EventStream(completion.chunks(), completion.identity, context.slow_client_timeout_s)
    answer = await unless_disconnected(request.receive, completion.whole())
    return JSONResponse(answer, headers={"X-Request-Id": completion.identity})


def _check(body: CompletionBody) -> None:
    refuse(body, ["suffix"])
    check_stream_options(body)
    if body.best_of is not None and body.best_of != num_choices(body):
        raise InvalidRequest("best_of other than n is not supported", param="best_of")


def prompts_of(given: Any, add_special_tokens: bool) -> list[Prompt]:
    """A text, a list of token ids, or a list of those. Raises InvalidRequest."""
    if given is None:
        raise InvalidRequest("prompt is missing", param="prompt")
    if isinstance(given, list) and not given:
        raise InvalidRequest("the prompt is empty", param="prompt")
    several = isinstance(given, list) and not isinstance(given[0], int)
    return [_prompt(each, add_special_tokens) for each in (given if several else [given])]


def _prompt(given: Any, add_special_tokens: bool) -> Prompt:
    if isinstance(given, str):
        return TextPrompt(given, add_special_tokens)
    if isinstance(given, list) and all(type(token_id) is int for token_id in given):
        return TokenPrompt(tuple(given))
    raise InvalidRequest(
        "prompt must be a text, a list of token ids, or a list of these", param="prompt"
    )


class _Completion:
    """One call: its requests, and the answer in one piece or in chunks."""

    def __init__(self, context: HttpContext, body: CompletionBody, identity: str) -> None:
        self.identity = identity
        self._service = context.service
        self._model = context.service.model
        self._body = body
        self._num_choices = num_choices(body)
        # No token is wanted, only what the model thinks of the prompt: one is made and dropped.
        self._prompt_only = body.max_tokens == 0 and bool(body.echo)
        self._envelope = envelope(identity, _KIND, body.model or self._model.name)
        prompts = prompts_of(body.prompt, body.add_special_tokens is not False)
        self._requests = [self._request(prompt) for prompt in prompts]

    def _request(self, prompt: Prompt) -> GenerationRequest:
        body = self._body
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        of_prompt = body.logprobs if body.echo else None
        return GenerationRequest(
            prompt=prompt,
            model=body.model or "",
            request_id=self.identity,
            sampling=sampling_of(body),
            stopping=stopping_of(body, 1 if self._prompt_only else max_tokens),
            output=OutputOptions(
                logprobs=body.logprobs,
                echo_prompt=bool(body.echo) or bool(body.return_token_ids),
                prompt_logprobs=of_prompt if body.prompt_logprobs is None else body.prompt_logprobs,
                skip_special_tokens=body.skip_special_tokens,
            ),
            priority=body.priority,
            num_choices=self._num_choices,
            cache_salt=body.cache_salt or "",
        )

    async def whole(self) -> dict[str, Any]:
        async with self._service.accept(self._requests) as choices:
            parts: list[list[dict[str, Any]]] = [[] for _ in choices]
            summaries: dict[int, Summary] = {}
            writers = self._writers(choices)
            async with events_of(choices) as events:
                async for index, event in events:
                    event = self._shown(event)
                    parts[index].append(writers[index].write(event))
                    if isinstance(event, Summary):
                        summaries[index] = event
        ordered = [summaries[index] for index in range(len(choices))]
        return {
            **self._envelope,
            "choices": [_merged(choice) for choice in parts],
            "usage": usage_of(ordered, self._num_choices),
        }

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        usage: dict[str, Any] = {"usage": None} if wants_usage(self._body) else {}
        async with self._service.accept(self._requests) as choices:
            summaries: dict[int, Summary] = {}
            writers = self._writers(choices)
            async with events_of(choices) as events:
                async for index, event in events:
                    event = self._shown(event)
                    entry = writers[index].write(event)
                    if isinstance(event, Summary):
                        summaries[index] = event
                    elif not shows(entry["text"], entry):
                        continue  # all of it is held back
                    yield {**self._envelope, "choices": [entry], **usage}
        if usage:
            ordered = [summaries[index] for index in range(len(choices))]
            usage = {"usage": usage_of(ordered, self._num_choices)}
            yield {**self._envelope, "choices": [], **usage}

    def _writers(self, choices: Sequence[Choice]) -> list[_ChoiceWriter]:
        return [
            _ChoiceWriter(index, choice, self._body, self._model)
            for index, choice in enumerate(choices)
        ]

    def _shown(self, event: Event) -> Event:
        if not self._prompt_only:
            return event
        if isinstance(event, Delta):
            return replace(event, tokens=(), text="")
        usage = replace(event.usage, completion_tokens=0)
        return replace(event, finish_reason=FinishReason.LENGTH, usage=usage)


class _ChoiceWriter:
    """Events of one choice as entries of "choices"."""

    def __init__(
        self, index: int, choice: Choice, body: CompletionBody, model: ServedModel
    ) -> None:
        self._index = index
        self._body = body
        self._eos_token_ids = model.eos_token_ids
        self._token_text = model.tokenizer.token_text
        at_start = bool(body.echo) or all(
            map(model.tokenizer.is_special, choice.prepared.prompt_token_ids)
        )
        self._logprobs = LegacyLogprobs(self._token_text, at_start=at_start)

    def write(self, event: Event) -> dict[str, Any]:
        ending: dict[str, Any] = {"finish_reason": None, "stop_reason": None}
        if isinstance(event, Summary):
            ending = ending_of(event, self._eos_token_ids)
            event = Delta(0)
        entry: dict[str, Any] = {"index": self._index, "text": self._text(event)}
        entry["logprobs"] = self._logprobs_of(event)
        entry |= ending
        if self._body.return_token_ids:
            entry["token_ids"] = [token.token_id for token in event.tokens]
            entry["prompt_token_ids"] = list(event.prompt.token_ids) if event.prompt else None
        if event.prompt is not None and self._body.prompt_logprobs is not None:
            entry["prompt_logprobs"] = prompt_logprobs(self._token_text, event.prompt)
        return entry

    def _text(self, delta: Delta) -> str:
        echoed = delta.prompt.text if delta.prompt is not None and self._body.echo else ""
        return echoed + delta.text

    def _logprobs_of(self, delta: Delta) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        parts = []
        if delta.prompt is not None and self._body.echo:
            parts.append(self._logprobs.of_prompt(delta.prompt))
        return joined([*parts, self._logprobs.of_tokens(delta.tokens)])


def _merged(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All entries of a choice as one: texts and lists go on, the last ending and the first prompt
    stay."""
    whole = dict(entries[-1])
    whole["text"] = "".join(entry["text"] for entry in entries)
    if whole["logprobs"] is not None:
        whole["logprobs"] = joined([entry["logprobs"] for entry in entries])
    if "token_ids" in whole:
        whole["token_ids"] = [token_id for entry in entries for token_id in entry["token_ids"]]
    for name in ("prompt_token_ids", "prompt_logprobs"):
        found = [entry[name] for entry in entries if entry.get(name) is not None]
        if found:
            whole[name] = found[0]
    return whole
