"""Puts a load on any server of OpenAI's HTTP API. Token counts are the server's own usage.

Prompts are words, as many as the server's tokenizer makes the wanted number of tokens of: that is
found by asking it before the run. What it does not know (`ignore_eos`, usage in streams) is left
out, and said in the notes.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from stagemesh.bench.client import Delivery, News, Served, Usage
from stagemesh.bench.prompts import WordRate, word_prompt
from stagemesh.bench.workload import Ask
from stagemesh.errors import (
    ConfigError,
    InvalidRequest,
    PeerLost,
    ProtocolError,
    RequestDeadlineExceeded,
    StageMeshError,
)

if TYPE_CHECKING:
    import httpx

_PROBE_WORDS = (16, 144)
_ONE_WORD = WordRate(fixed_tokens=0.0, tokens_per_word=1.0)


class HttpClient:
    """`calibrate` before the first request."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        model: str,
        max_tokens: int,
        *,
        chat: bool,
        temperature: float,
    ) -> None:
        self._http = http
        self._chat = chat
        self._path = "chat/completions" if chat else "completions"
        self._model, self._max_tokens = model, max_tokens
        self._common: dict[str, Any] = {"model": model, "temperature": temperature}
        self._words = _ONE_WORD
        self._usage_in_stream = True
        self._notes: list[str] = []

    @property
    def served(self) -> Served:
        return Served(self._model, self._max_tokens, tuple(self._notes))

    async def calibrate(self) -> None:
        """Finds out how the server counts words, and which of our wishes it knows."""
        try:
            await self._probe(1, ignore_eos=True)
            self._common["ignore_eos"] = True
        except InvalidRequest:
            self._notes.append("the server knows no ignore_eos: outputs may be shorter than asked")
        few, many = [(num, await self._probe(num)) for num in _PROBE_WORDS]
        try:
            self._words = WordRate.of(few, many)
        except ValueError as error:
            raise ProtocolError(f"the server's usage makes no sense: {error}") from None
        await self._try_usage()

    async def _probe(self, num_words: int, **wishes: Any) -> int:
        """Tokens of a prompt of `num_words`, by the server's count."""
        ask = Ask(num_words, 1, seed=num_words)
        body = self._body(word_prompt(ask, _ONE_WORD), 1) | wishes
        answer = await self._http.post(self._path, json=body)
        _raise_for(answer.status_code, answer.content)
        try:
            return int(answer.json()["usage"]["prompt_tokens"])
        except (ValueError, KeyError, TypeError):
            raise ProtocolError("the server's answers have no usage: tokens unknown") from None

    async def _try_usage(self) -> None:
        try:
            news = [each async for each in self.stream(self.prepare(Ask(8, 2, seed=8)))]
        except InvalidRequest:
            self._usage_in_stream, news = False, []
        if not any(isinstance(each, Usage) for each in news):
            self._notes.append("streams carry no usage: every message counts as one token")

    def prepare(self, ask: Ask) -> bytes:
        body = self._body(word_prompt(ask, self._words), ask.output_tokens)
        body |= {"stream": True, "seed": ask.seed}
        if self._usage_in_stream:
            body["stream_options"] = {"include_usage": True}
        return json.dumps(body).encode()

    def _body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        said: dict[str, Any] = {"prompt": prompt}
        if self._chat:
            said = {"messages": [{"role": "user", "content": prompt}]}
        return {**self._common, **said, "max_tokens": max_tokens}

    async def stream(self, prepared: Any) -> AsyncGenerator[News, None]:
        import httpx

        headers = {"Content-Type": "application/json"}
        try:
            async with self._http.stream(
                "POST", self._path, content=prepared, headers=headers
            ) as response:
                if response.status_code != 200:
                    _raise_for(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
                        for news in _news(_parsed(data)):
                            yield news
        except httpx.TimeoutException:
            raise RequestDeadlineExceeded("the server was silent for too long") from None
        except httpx.HTTPError as error:
            raise PeerLost(f"{type(error).__name__}: {error}") from None


def _parsed(data: str) -> Mapping[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        raise ProtocolError(f"an event that is no JSON: {data[:80]}") from None
    if not isinstance(event, dict):
        raise ProtocolError(f"an event that is no object: {data[:80]}")
    if event.get("error"):
        raise PeerLost(f"the server ended the stream: {_message(event)}")
    return event


def _news(event: Mapping[str, Any]) -> list[News]:
    news: list[News] = []
    if any(_says_something(choice) for choice in event.get("choices") or ()):
        news.append(Delivery(None))
    usage = event.get("usage")
    # Some servers send a running usage with every event; the one without choices is the last.
    if usage and not event.get("choices"):
        details = usage.get("prompt_tokens_details") or {}
        news.append(
            Usage(usage["prompt_tokens"], usage["completion_tokens"], details.get("cached_tokens"))
        )
    return news


def _says_something(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("content") or delta.get("reasoning_content"))


def _raise_for(status: int, content: bytes) -> None:
    if status == 200:
        return
    try:
        message = _message(json.loads(content))
    except ValueError:
        message = content[:200].decode("utf-8", "replace")
    if status in (400, 422):
        raise InvalidRequest(message)
    raise StageMeshError(f"HTTP {status}: {message}")


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)


@asynccontextmanager
async def http_client(
    url: str, *, model: str, chat: bool, api_key: str, temperature: float, timeout_s: float
) -> AsyncIterator[HttpClient]:
    """Of the server at `url`, which ends in /v1 as the openai client's base_url does.

    Raises ConfigError where httpx is not installed, PeerLost where nobody answers.
    """
    try:
        import httpx
    except ImportError:
        raise ConfigError("--url needs httpx: pip install 'stagemesh[bench]'") from None
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=url.rstrip("/") + "/",
        headers={"Authorization": f"Bearer {api_key}"},
        timeout=httpx.Timeout(timeout_s),
        limits=limits,
        # As the mesh's own channels: a server under test is never behind the host's proxy.
        trust_env=False,
    ) as http:
        try:
            name, max_tokens = await _model(http, model)
            client = HttpClient(http, name, max_tokens, chat=chat, temperature=temperature)
            await client.calibrate()
        except httpx.TransportError as error:
            raise PeerLost(f"no server answers at {url}: {error or type(error).__name__}") from None
        yield client


async def _model(http: httpx.AsyncClient, wanted: str) -> tuple[str, int]:
    """(its name, its longest context, 0 where the server does not say)."""
    answer = await http.get("models")
    if answer.status_code != 200:
        if wanted:
            return wanted, 0
        raise ConfigError(f"the server lists no models (HTTP {answer.status_code}): --served-model")
    listed = {str(each.get("id")): each for each in answer.json().get("data") or ()}
    if wanted and wanted not in listed:
        raise ConfigError(f"--served-model {wanted}: the server has {', '.join(listed) or 'none'}")
    if not wanted and len(listed) != 1:
        raise ConfigError(f"--served-model must name one of {', '.join(listed) or 'none'}")
    name = wanted or next(iter(listed))
    return name, int(listed[name].get("max_model_len") or 0)
