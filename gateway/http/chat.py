"""/v1/chat/completions: a conversation, rendered with the model's own template."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

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
from gateway.http.logprobs import chat_logprobs, prompt_logprobs
from gateway.http.reading import read_body
from gateway.http.schemas import UNSUPPORTED_IN_CHAT, ChatBody, Message
from gateway.http.streaming import EventStream, events_of, unless_disconnected
from gateway.requests import (
    ChatPrompt,
    Delta,
    Event,
    GenerationRequest,
    OutputOptions,
    Summary,
)
from stagemesh.errors import InvalidRequest


async def create_chat_completion(context: HttpContext, request: Request) -> Response:
    body = await read_body(request, ChatBody, context)
    _check(body)
    chat = _Chat(context, body, answer_id("chatcmpl", request, body))
    if body.stream:
        return EventStream(chat.chunks(), chat.identity, context.slow_client_timeout_s)
    answer = await unless_disconnected(request.receive, chat.whole())
    return JSONResponse(answer, headers={"X-Request-Id": chat.identity})


def _check(body: ChatBody) -> None:
    refuse(body, UNSUPPORTED_IN_CHAT)
    check_stream_options(body)
    if body.tool_choice not in (None, "none"):
        raise InvalidRequest("tool_choice is not supported", param="tool_choice")
    if body.echo:
        raise InvalidRequest("echo is not supported in chats", param="echo")
    if body.response_format is not None and body.response_format.type != "text":
        raise InvalidRequest(
            f"response_format {body.response_format.type!r} is not supported, only 'text'",
            param="response_format",
        )
    if body.modalities not in (None, ["text"]):
        raise InvalidRequest("modalities other than text are not supported", param="modalities")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")


def messages_of(given: Sequence[Message]) -> tuple[dict[str, Any], ...]:
    """As a template sees them: content is a text. Raises InvalidRequest for other parts."""
    return tuple(
        {**message.model_dump(exclude_unset=True), "content": _content(message)}
        for message in given
    )


def _content(message: Message) -> str:
    if not isinstance(message.content, list):
        return message.content or ""
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise InvalidRequest(
                f"content parts of type {part.type!r} are not supported, only 'text'",
                param="messages",
            )
    return "\n".join(part.text or "" for part in message.content)


def chat_prompt(
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool,
    add_special_tokens: bool | None,
) -> ChatPrompt:
    """Without a word on it, an assistant's turn is begun unless the last message is continued."""
    add = not continue_final_message if add_generation_prompt is None else add_generation_prompt
    return ChatPrompt(messages_of(messages), add, continue_final_message, bool(add_special_tokens))


class _Chat:
    """One call: its request, and the answer in one piece or in chunks."""

    def __init__(self, context: HttpContext, body: ChatBody, identity: str) -> None:
        self.identity = identity
        self._service = context.service
        self._model = context.service.model
        self._token_text = self._model.tokenizer.token_text
        self._body = body
        self._name = body.model or self._model.name
        self._num_choices = num_choices(body)
        self._request = self._make_request()

    def _make_request(self) -> GenerationRequest:
        body = self._body
        max_tokens = body.max_completion_tokens
        return GenerationRequest(
            prompt=chat_prompt(
                body.messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                add_special_tokens=body.add_special_tokens,
            ),
            model=body.model or "",
            request_id=self.identity,
            sampling=sampling_of(body),
            stopping=stopping_of(body, body.max_tokens if max_tokens is None else max_tokens),
            output=OutputOptions(
                logprobs=(body.top_logprobs or 0) if body.logprobs else None,
                echo_prompt=bool(body.return_token_ids),
                prompt_logprobs=body.prompt_logprobs,
                skip_special_tokens=body.skip_special_tokens,
            ),
            priority=body.priority,
            num_choices=self._num_choices,
            cache_salt=body.cache_salt or "",
        )

    async def whole(self) -> dict[str, Any]:
        async with self._service.accept([self._request]) as choices:
            found: list[list[Event]] = [[] for _ in choices]
            async with events_of(choices) as events:
                async for index, event in events:
                    found[index].append(event)
        summaries = [event for each in found for event in each if isinstance(event, Summary)]
        answer = envelope(self.identity, "chat.completion", self._name)
        answer["choices"] = [
            self._choice(index, [event for event in each if isinstance(event, Delta)], summary)
            for index, (each, summary) in enumerate(zip(found, summaries, strict=True))
        ]
        answer["usage"] = usage_of(summaries, self._num_choices)
        return answer | self._of_prompt([each[0] for each in found][:1])

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        shell = envelope(self.identity, "chat.completion.chunk", self._name)
        usage: dict[str, Any] = {"usage": None} if wants_usage(self._body) else {}
        summaries: list[Summary] = []
        begun: set[int] = set()
        async with (
            self._service.accept([self._request]) as choices,
            events_of(choices) as events,
        ):
            async for index, event in events:
                if index not in begun:
                    begun.add(index)
                    role = {"role": "assistant", "content": ""}
                    yield {**shell, "choices": [_chunk(index, role)], **usage}
                entry = self._chunk_of(index, event)
                if isinstance(event, Summary):
                    summaries.append(event)
                elif not shows(event.text, entry) and event.prompt is None:
                    continue  # all of it is held back
                yield {**shell, "choices": [entry], **usage, **self._of_prompt([event])}
        if usage:
            totals = {"usage": usage_of(summaries, self._num_choices)}
            yield {**shell, "choices": [], **totals}

    def _choice(self, index: int, deltas: Sequence[Delta], summary: Summary) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        tokens = [token for delta in deltas for token in delta.tokens]
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            **ending_of(summary, self._model.eos_token_ids),
        }
        if self._body.return_token_ids:
            choice["token_ids"] = [token.token_id for token in tokens]
        return choice

    def _chunk_of(self, index: int, event: Event) -> dict[str, Any]:
        if isinstance(event, Summary):
            return _chunk(index, {}) | ending_of(event, self._model.eos_token_ids)
        entry = _chunk(index, {"content": event.text})
        entry["logprobs"] = self._logprobs(event.tokens)
        if self._body.return_token_ids:
            entry["token_ids"] = [token.token_id for token in event.tokens]
        return entry

    def _logprobs(self, tokens: Sequence[Any]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {"content": chat_logprobs(self._token_text, tokens), "refusal": None}

    def _of_prompt(self, events: Sequence[Event]) -> dict[str, Any]:
        """What was asked for of the prompt, beside the choices, with a choice's first event."""
        found: dict[str, Any] = {}
        for event in events:
            if not isinstance(event, Delta) or event.prompt is None:
                continue
            if self._body.return_token_ids:
                found["prompt_token_ids"] = list(event.prompt.token_ids)
            if self._body.prompt_logprobs is not None:
                found["prompt_logprobs"] = prompt_logprobs(self._token_text, event.prompt)
        return found


def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
