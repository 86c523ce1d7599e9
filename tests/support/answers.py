"""Whole answers of a gateway, over gRPC and HTTP: equal where the client was told the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import httpx
from google.protobuf import json_format

from protos import text_generation_pb2 as pb
from protos import text_generation_pb2_grpc as pb_grpc

_CALL_TIMEOUT_S = 120.0


@dataclass
class Answer:
    """One Generate call. How the text was cut into deltas is no part of what is compared."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    prompt: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None

    def take(self, response: pb.GenerateResponse) -> None:
        assert self.summary is None, "a message after the summary"
        if response.WhichOneof("event") == "summary":
            self.summary = json_format.MessageToDict(response.summary)
            self.summary.pop("timings")
            self.summary.pop("requestId")
            return
        delta = response.delta
        assert delta.index == len(self.token_ids), "tokens are missing or doubled"
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.logprobs += [json_format.MessageToDict(entry) for entry in delta.logprobs]
        if delta.HasField("prompt"):
            assert self.prompt is None, "the prompt twice"
            self.prompt = json_format.MessageToDict(delta.prompt)


class Asking:
    """Calls that are all under way at once; `answers` grow while they run."""

    def __init__(self, address: str, requests: Sequence[pb.GenerateRequest]) -> None:
        self.answers = [Answer() for _ in requests]
        self._channel = grpc.aio.insecure_channel(address)
        stub = pb_grpc.TextGenerationStub(self._channel)  # type: ignore[no-untyped-call]
        self._tasks = [
            asyncio.create_task(self._read(stub.Generate(request, timeout=_CALL_TIMEOUT_S), answer))
            for request, answer in zip(requests, self.answers, strict=True)
        ]

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)

    async def until_tokens(self, in_all: int, *, each: int = 0) -> None:
        """Until so many tokens came in all, and for each; fails where everything ended before."""
        while self.num_tokens < in_all or any(len(a.token_ids) < each for a in self.answers):
            assert not all(task.done() for task in self._tasks), "all has ended"
            await asyncio.sleep(0.01)  # between two looks, never instead of one

    async def finish(self) -> list[Answer]:
        try:
            await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            await self._channel.close()
        return self.answers

    async def _read(self, call: Any, answer: Answer) -> None:
        async for response in call:
            answer.take(response)


async def post(url: str, path: str, body: dict[str, Any]) -> Any:
    """The answer in one piece, without what differs between equal answers."""
    async with httpx.AsyncClient(base_url=url, timeout=_CALL_TIMEOUT_S) as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return {key: value for key, value in answer.json().items() if key not in ("id", "created")}


async def post_stream(url: str, path: str, body: dict[str, Any]) -> Any:
    """The streamed answer: by choice its text, its end and its log-probabilities; and the usage."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    async with httpx.AsyncClient(base_url=url, timeout=_CALL_TIMEOUT_S) as http:
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with http.stream("POST", path, json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                usage = chunk.get("usage") or usage
                for part in chunk["choices"]:
                    _add(choices.setdefault(part["index"], {"text": "", "logprobs": []}), part)
    return choices, usage


def _add(choice: dict[str, Any], part: dict[str, Any]) -> None:
    choice["text"] += part["text"] if "text" in part else part["delta"].get("content") or ""
    logprobs = part["logprobs"] or {}
    if logprobs.get("content"):
        choice["logprobs"] += logprobs["content"]
    elif logprobs.get("tokens"):
        names = ("tokens", "token_logprobs", "text_offset")
        choice["logprobs"] += zip(*(logprobs[name] for name in names), strict=True)
    if part["finish_reason"] is not None:
        assert "end" not in choice, "a second end"
        choice["end"] = (part["finish_reason"], part.get("stop_reason"))
