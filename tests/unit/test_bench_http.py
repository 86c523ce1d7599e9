"""The HTTP client against servers that know less than ours, and against ones that misbehave."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from stagemesh.bench.client import Delivery, News, Usage
from stagemesh.bench.http_client import HttpClient
from stagemesh.bench.workload import Ask
from stagemesh.errors import InvalidRequest, PeerLost, ProtocolError, StageMeshError

Handler = Callable[[dict[str, Any]], httpx.Response]


class Server:
    """Counts two tokens and one and a half per word; a stream has one chunk per token."""

    def __init__(self, *, refuses: tuple[str, ...] = (), usage_in_stream: bool = True) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._refuses = refuses
        self._usage_in_stream = usage_in_stream

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        for name in self._refuses:
            if name in body:
                return httpx.Response(400, json={"error": {"message": f"{name}: unknown"}})
        prompt = body.get("prompt") or body["messages"][0]["content"]
        usage = {
            "prompt_tokens": 2 + len(prompt.split()) * 3 // 2,
            "completion_tokens": body["max_tokens"],
        }
        if not body.get("stream"):
            return httpx.Response(200, json={"choices": [{"text": "x"}], "usage": usage})
        return httpx.Response(200, content=self._events(body, usage))

    def _events(self, body: dict[str, Any], usage: dict[str, Any]) -> bytes:
        chat = "messages" in body
        events: list[Any] = [{"choices": [{"delta": {"role": "assistant"}}]}] if chat else []
        said = {"delta": {"content": "a"}} if chat else {"text": "a"}
        events += [{"choices": [said]}] * body["max_tokens"]
        events += [{"choices": [{"text": "", "finish_reason": "length"}]}]
        if self._usage_in_stream:
            events += [{"choices": [], "usage": usage}]
        lines = [": a comment", *(f"data: {json.dumps(event)}" for event in events), "data: [DONE]"]
        return "".join(f"{line}\n\n" for line in lines).encode()


async def connected(server: Any, *, chat: bool = False) -> AsyncIterator[HttpClient]:
    transport = httpx.MockTransport(server)
    async with httpx.AsyncClient(transport=transport, base_url="http://server/v1/") as http:
        yield HttpClient(http, "m", 0, chat=chat, temperature=0.0)


async def streamed(client: HttpClient, ask: Ask) -> list[News]:
    return [news async for news in client.stream(client.prepare(ask))]


@pytest.mark.parametrize("chat", [False, True])
async def test_prompts_are_as_long_as_the_server_counts(chat: bool) -> None:
    server = Server()
    async for client in connected(server, chat=chat):
        await client.calibrate()
        assert client.served.notes == ()
        *deliveries, usage = await streamed(client, Ask(302, 5, seed=1))
        assert deliveries == 5 * [Delivery(None)]
        assert usage == Usage(302, 5, None)
    assert server.bodies[-1]["ignore_eos"] is True
    assert server.bodies[-1]["stream_options"] == {"include_usage": True}


async def test_what_a_server_does_not_know_is_left_out_and_noted() -> None:
    server = Server(refuses=("ignore_eos", "stream_options"), usage_in_stream=False)
    async for client in connected(server):
        await client.calibrate()
        assert await streamed(client, Ask(30, 4, seed=1)) == 4 * [Delivery(None)]
        assert len(client.served.notes) == 2
    assert "ignore_eos" not in server.bodies[-1]
    assert "stream_options" not in server.bodies[-1]


async def test_a_server_without_usage_cannot_be_calibrated() -> None:
    def no_usage(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"choices": [{"text": "x"}]})

    async for client in connected(no_usage):
        with pytest.raises(ProtocolError, match="no usage"):
            await client.calibrate()


@pytest.mark.parametrize(
    ("status", "content", "error", "message"),
    [
        (400, b'{"error": {"message": "too long"}}', InvalidRequest, "too long"),
        (503, b"no room", StageMeshError, "HTTP 503: no room"),
        (200, b'data: {"choices": [{"text": "a"}]}\n\ndata: {"error": {"message": "x"}}\n\n',
         PeerLost, "ended the stream: x"),
        (200, b"data: {\n\n", ProtocolError, "no JSON"),
        (200, b"data: 3\n\n", ProtocolError, "no object"),
    ],
)  # fmt: skip
async def test_what_goes_wrong_is_one_of_our_errors(
    status: int, content: bytes, error: type[StageMeshError], message: str
) -> None:
    async for client in connected(lambda request: httpx.Response(status, content=content)):
        with pytest.raises(error, match=message):
            await streamed(client, Ask(30, 4, seed=1))


async def test_a_server_that_goes_away_is_a_lost_peer() -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("reset")

    async for client in connected(gone):
        with pytest.raises(PeerLost, match="reset"):
            await streamed(client, Ask(30, 4, seed=1))
