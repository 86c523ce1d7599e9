"""The openai package, unmodified, against a whole mesh."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from support.mesh import Mesh, running_mesh
from support.paths import DEMO_MODEL


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with running_mesh(DEMO_MODEL, "--batch-invariant", stages=2) as running:
        yield running


@pytest.fixture
def client(mesh: Mesh) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{mesh.http_url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_completion(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=16, temperature=0
    )
    assert answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 16
    assert answer.choices[0].finish_reason in {"length", "stop"}


def test_streaming_gives_the_same_text(client: openai.OpenAI, model: str) -> None:
    def create(stream: bool):  # type: ignore[no-untyped-def]
        return client.completions.create(
            model=model,
            prompt="The cat",
            max_tokens=24,
            seed=7,
            stream=stream,
            stream_options={"include_usage": True} if stream else openai.NOT_GIVEN,
        )

    whole = create(stream=False)
    chunks = list(create(stream=True))
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_n_choices_are_different_and_repeatable(client: openai.OpenAI, model: str) -> None:
    def texts() -> list[str]:
        answer = client.completions.create(
            model=model, prompt="One day", max_tokens=24, n=4, seed=11, temperature=1.0
        )
        return [c.text for c in sorted(answer.choices, key=lambda choice: choice.index)]

    first = texts()
    assert len(set(first)) > 1
    assert texts() == first


def test_stop_ends_before_the_text(client: openai.OpenAI, model: str) -> None:
    free = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=60, temperature=0
    ).choices[0]
    stop = free.text.split()[4]
    stopped = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=60, temperature=0, stop=[stop]
    ).choices[0]
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"


def test_logprobs(client: openai.OpenAI, model: str) -> None:
    choice = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=8, temperature=0, logprobs=3, echo=True
    ).choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:] if value is not None)
    assert "".join(logprobs.tokens).endswith(choice.text.split()[-1])


def test_chat(client: openai.OpenAI, model: str) -> None:
    messages = [{"role": "user", "content": "Tell me a story about a dog."}]
    answer = client.chat.completions.create(
        model=model,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=24,
        seed=3,
        logprobs=True,
        top_logprobs=2,
    )
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert answer.usage is not None
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    stream = client.chat.completions.create(
        model=model,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=24,
        seed=3,
        stream=True,
    )
    pieces = [c.delta.content or "" for chunk in stream for c in chunk.choices]
    assert "".join(pieces) == choice.message.content


def test_errors_are_typed(client: openai.OpenAI, model: str, mesh: Mesh) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="x")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model=model, prompt="x", max_tokens=-1)
    with pytest.raises(openai.BadRequestError, match="no_such_option"):
        client.completions.create(model=model, prompt="x", extra_body={"no_such_option": 1})
    response = httpx.post(f"{mesh.http_url}/v1/completions", content=b'{"prompt": ')
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    answer = client.completions.create(model=model, prompt="Still there?", max_tokens=4)
    assert answer.usage is not None
