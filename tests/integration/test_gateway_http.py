"""The OpenAI-compatible front: the openai client unmodified, and what it would never send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.paths import DEMO_MODEL
from support.scripted_scheduler import (
    Finished,
    Gateway,
    ScriptedScheduler,
    Submit,
    scripted_gateway,
    until,
)

from gateway.seeds import choice_seed
from gateway.tokenizer import Tokenizer
from protos import mesh_pb2, plan_pb2

TOKENIZER = Tokenizer.from_directory(DEMO_MODEL)
TEXT = "Once upon a time there was a 🦙, and it said naïve things."
TEXT_IDS = list(TOKENIZER.encode(TEXT, add_special_tokens=False))
MESSAGES: Any = [{"role": "user", "content": "Hello"}]


def say_text(submit: Submit) -> list[int]:
    return [*TEXT_IDS, *submit.sampling.stop_token_ids[-1:]]


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    async with scripted_gateway(DEMO_MODEL, max_body_bytes=200_000) as running:
        yield running


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{gateway.url}/v1", api_key="none", max_retries=0
    ) as made:
        yield made


@pytest.fixture
async def http(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=30.0) as made:
        yield made


async def complete(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await http.post("/v1/completions", json={"prompt": "Once", "max_tokens": 4} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


# ---- the openai client ----


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id for model in (await client.models.list()).data] == ["demo"]
    assert (await client.models.retrieve("demo")).id == "demo"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("another")


async def test_completion(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    gateway.scheduler.script = say_text
    answer = await client.completions.create(model="demo", prompt="Tell", max_tokens=100)
    assert answer.choices[0].text == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(TOKENIZER.encode("Tell"))
    assert answer.usage.completion_tokens == len(TEXT_IDS) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(TEXT_IDS) + 1
    await client.completions.create(model="demo", prompt="Tell")
    assert gateway.scheduler.submits[-1].max_tokens == 16


async def test_streamed_completion(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    gateway.scheduler.script = say_text
    stream = await client.completions.create(
        model="demo",
        prompt="Tell",
        max_tokens=100,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == TEXT
    assert all(chunk.choices[0].text for chunk in chunks[:-2])
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(TEXT_IDS) + 1
    assert len({chunk.id for chunk in chunks}) == 1


async def test_several_prompts_and_choices(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    prompts: Any = [[5, 6, 7], [5, 6, 8]]
    answer = await client.completions.create(
        model="demo", prompt=prompts, n=2, seed=42, max_tokens=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    submits = sorted(gateway.scheduler.submits, key=lambda s: (s.prompt_token_ids[-1], s.request))
    assert [list(s.prompt_token_ids) for s in submits] == [prompts[0]] * 2 + [prompts[1]] * 2
    assert {s.sampling.seed for s in submits} == {42, choice_seed(42, 1)}
    assert submits[0].sampling.seed == submits[2].sampling.seed == 42
    expected = [TOKENIZER.decode(gateway.scheduler.script(s)) for s in submits]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 12)


async def test_streamed_choices_come_side_by_side(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    stream = await client.completions.create(
        model="demo", prompt=["Once", "Twice"], n=2, stream=True, max_tokens=5
    )
    texts = dict.fromkeys(range(4), "")
    endings = []
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            endings += [choice.index] * (choice.finish_reason is not None)
    assert sorted(endings) == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]


async def test_echo_and_logprobs(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="demo", prompt="Once upon", max_tokens=3, logprobs=2, echo=True
    )
    choice = answer.choices[0]
    logprobs = choice.logprobs
    assert choice.text.startswith("Once upon")
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.text_offset is not None
    assert logprobs.top_logprobs is not None
    num_prompt = len(TOKENIZER.encode("Once upon"))
    assert len(logprobs.tokens) == len(logprobs.text_offset) == num_prompt + 3
    assert logprobs.token_logprobs == [None, *[-0.5] * (num_prompt + 2)]
    assert logprobs.top_logprobs[0] is None
    assert len(logprobs.top_logprobs[1]) == 2
    for token, offset in zip(logprobs.tokens[1:], logprobs.text_offset[1:], strict=True):
        assert choice.text[offset:].startswith(token)


async def test_scoring_a_prompt_without_output(http: httpx.AsyncClient) -> None:
    answer = await complete(http, prompt="Once upon", max_tokens=0, echo=True, logprobs=0)
    (choice,) = answer["choices"]
    assert choice["text"] == "Once upon"
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == len(TOKENIZER.encode("Once upon"))
    assert answer["usage"]["completion_tokens"] == 0


async def test_stop(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    gateway.scheduler.script = say_text
    answer = await client.completions.create(
        model="demo", prompt="Tell", max_tokens=100, stop=["time there"]
    )
    assert answer.choices[0].text == "Once upon a "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == "time there"  # type: ignore[attr-defined]


async def test_chat(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    gateway.scheduler.script = say_text
    answer = await client.chat.completions.create(
        model="demo", messages=MESSAGES, logprobs=True, top_logprobs=2, max_completion_tokens=100
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", TEXT)
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    shown = [entry for entry in choice.logprobs.content if entry.bytes is not None]
    assert b"".join(bytes(entry.bytes or []) for entry in shown).decode().startswith(TEXT)
    assert [len(entry.top_logprobs) for entry in shown] == [2] * (len(TEXT_IDS) + 1)
    expected = TOKENIZER.encode(f"{TOKENIZER.bos_token}Hello", add_special_tokens=False)
    assert tuple(gateway.scheduler.submits[0].prompt_token_ids) == expected


async def test_streamed_chat(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    gateway.scheduler.script = say_text
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    stream = await client.chat.completions.create(
        model="demo", messages=parts, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    first = {}
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            first.setdefault(choice.index, choice.delta.role)
            texts[choice.index] += choice.delta.content or ""
    assert first == {0: "assistant", 1: "assistant"}
    assert texts == {0: TEXT, 1: TEXT}
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2 * (len(TEXT_IDS) + 1)


async def test_continuing_a_message(gateway: Gateway, http: httpx.AsyncClient) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "I am"}]
    body = {"messages": messages, "continue_final_message": True, "max_tokens": 1}
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    prompt = TOKENIZER.decode(gateway.scheduler.submits[0].prompt_token_ids)
    assert prompt.endswith("I am")


# ---- vLLM's extensions ----


async def test_extensions(gateway: Gateway, http: httpx.AsyncClient) -> None:
    answer = await complete(
        http,
        prompt=[7, 8, 9],
        top_k=-1,
        min_p=0.25,
        repetition_penalty=1.5,
        min_tokens=2,
        stop_token_ids=[9],
        ignore_eos=True,
        return_token_ids=True,
        prompt_logprobs=1,
        priority=5,
        cache_salt="mine",
        logit_bias={"12": -5},
    )
    (submit,) = gateway.scheduler.submits
    assert (submit.sampling.top_k, submit.sampling.min_p) == (0, 0.25)
    assert submit.sampling.repetition_penalty == 1.5
    assert submit.sampling.min_tokens == 2
    assert list(submit.sampling.stop_token_ids) == [9]
    assert dict(submit.sampling.logit_bias) == {12: -5.0}
    assert (submit.priority, submit.cache_salt) == (5, "mine")
    (choice,) = answer["choices"]
    assert choice["prompt_token_ids"] == [7, 8, 9]
    assert choice["token_ids"] == gateway.scheduler.script(submit)
    assert [p if p is None else list(p) for p in choice["prompt_logprobs"]] == [None, ["8"], ["9"]]
    assert "text" in choice
    assert not choice["text"].startswith(TOKENIZER.decode([7, 8, 9]))


async def test_labels(gateway: Gateway, http: httpx.AsyncClient) -> None:
    answer = await http.post(
        "/v1/completions", json=GENERATE | {"request_id": "mine\r\nX-Evil: 1ü"}
    )
    assert answer.headers["x-request-id"] == answer.json()["id"] == "cmpl-mineX-Evil: 1"
    assert "x-evil" not in answer.headers
    named = await http.post("/v1/completions", json=GENERATE, headers={"X-Request-Id": "theirs"})
    assert named.json()["id"] == gateway.scheduler.submits[-1].label == "cmpl-theirs"


async def test_tokenize_and_detokenize(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/tokenize", json={"prompt": TEXT, "return_token_strs": True})).json()
    assert answer["tokens"] == [0, *TEXT_IDS]
    assert (answer["count"], answer["max_model_len"]) == (len(TEXT_IDS) + 1, 512)
    assert answer["token_strs"][1] == TOKENIZER.token_text.text_of(TEXT_IDS[0])
    bare = await http.post("/tokenize", json={"prompt": TEXT, "add_special_tokens": False})
    assert bare.json()["tokens"] == TEXT_IDS
    chat = (await http.post("/tokenize", json={"messages": MESSAGES})).json()
    assert chat["tokens"][0] == 0
    back = (await http.post("/detokenize", json={"tokens": TEXT_IDS})).json()
    assert back == {"prompt": TEXT}


async def test_health(gateway: Gateway, http: httpx.AsyncClient) -> None:
    async def until_health(status: int) -> dict[str, Any]:
        async with asyncio.timeout(60):
            while (answer := await http.get("/health")).status_code != status:
                pass
        return answer.json()

    await until_health(200)
    await gateway.scheduler.set_serving(False)
    assert (await until_health(503))["detail"] == "no worker yet"


async def test_metrics(gateway: Gateway, http: httpx.AsyncClient) -> None:
    await complete(http)
    await http.post("/v1/completions", json={"prompt": "x", "temperature": -1})
    found = text_string_to_metric_families((await http.get("/metrics")).text)
    values = {
        (s.name, s.labels.get("outcome", "")): s.value for family in found for s in family.samples
    }
    assert values["stagemesh_requests_total", "length"] == 1
    assert values["stagemesh_requests_total", "invalid_request"] == 1
    assert values["stagemesh_generated_tokens_total", ""] == 4
    assert values["stagemesh_time_to_first_token_seconds_count", ""] == 1
    assert values["stagemesh_requests_in_progress", ""] == 0
    assert values["stagemesh_scheduler_waiting_requests", ""] == 3
    assert values["stagemesh_scheduler_kv_blocks", ""] == 10
    assert values["stagemesh_scheduler_free_kv_blocks", ""] == 7


# ---- what goes wrong ----

GENERATE = {"prompt": "Once", "max_tokens": 4}
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no prompt": ({"prompt": None}, "prompt", "missing"),
    "empty prompt": ({"prompt": ""}, "prompt", "empty"),
    "no tokens": ({"prompt": []}, "prompt", "empty"),
    "a prompt of no kind": ({"prompt": 5}, "prompt", "token ids"),
    "mixed tokens": ({"prompt": [1, "x"]}, "prompt", "token ids"),
    "over the context": ({"prompt": [5] * 600}, "prompt", "600 tokens"),
    "token out of range": ({"prompt": [5, 999999]}, "prompt", "999999"),
    "negative token": ({"prompt": [5, -1]}, "prompt", "-1"),
    "negative max_tokens": ({"max_tokens": -1}, "max_tokens", "-1"),
    "no max_tokens": ({"max_tokens": 0}, "max_tokens", "at least 1"),
    "max_tokens of a text": ({"max_tokens": "4"}, "max_tokens", "integer"),
    "min over max": ({"min_tokens": 9}, "min_tokens", "more than max_tokens"),
    "negative min": ({"min_tokens": -1}, "min_tokens", "-1"),
    "top_p": ({"top_p": 0}, "top_p", "greater than 0"),
    "vanishing top_p": ({"top_p": 1e-300}, "top_p", "greater than 0"),
    "min_p": ({"min_p": 2}, "min_p", "[0, 1]"),
    "unknown option": ({"no_such_option": 1}, "no_such_option", "no_such_option"),
    "10,000 stops": ({"stop": [f"s{n}" for n in range(10_000)]}, "stop", "64"),
    "empty stop": ({"stop": [""]}, "stop", "0 characters"),
    "long stop": ({"stop": "x" * 1000}, "stop", "1000"),
    "stop token": ({"stop_token_ids": [10**6]}, "stop_token_ids", "1000000"),
    "logit_bias of a word": ({"logit_bias": {"dog": 1}}, "logit_bias", "dog"),
    "logit_bias out of range": ({"logit_bias": {"999999": 1}}, "logit_bias", "999999"),
    "logprobs": ({"logprobs": 21}, "logprobs", "[0, 20]"),
    "n": ({"n": 0}, "n", "[1, 128]"),
    "many": ({"prompt": ["x"] * 1025}, "n", "1025"),
    "best_of": ({"best_of": 3}, "best_of", "best_of"),
    "suffix": ({"suffix": "x"}, "suffix", "suffix"),
    "huge seed": ({"seed": 2**70}, "seed", "18446744073709551616"),
    "stream_options": ({"stream_options": {}}, "stream_options", "streams"),
    "half a character": ({"prompt": "\ud800"}, "", ""),
}


def check_error(answer: httpx.Response, status: int, param: str | None, mention: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) - {"retry_after_s"} == {"message", "type", "param", "code"}
    if param != "":
        assert error["param"] == param
    assert mention in error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_bad_requests(gateway: Gateway, http: httpx.AsyncClient, stream: bool) -> None:
    for name, (fields, param, mention) in BAD.items():
        body = {**GENERATE, **fields}
        if name != "stream_options":
            body["stream"] = stream
        answer = await http.post("/v1/completions", content=json.dumps(body))
        print(name, answer.text[:200])
        check_error(answer, 400, param, mention)
    assert gateway.scheduler.submits == []
    await complete(http)


async def test_nan(http: httpx.AsyncClient) -> None:
    for value in ("NaN", "Infinity", "1e400"):
        content = f'{{"prompt": "x", "temperature": {value}}}'
        check_error(
            await http.post("/v1/completions", content=content), 400, "temperature", "temperature"
        )


BAD_CHATS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no messages": ({"messages": []}, "messages", "no messages"),
    "messages missing": ({"messages": None}, "messages", "messages"),
    "tools": ({"tools": [{}]}, "tools", "not supported"),
    "json": ({"response_format": {"type": "json_object"}}, "response_format", "json_object"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages",
        "image_url",
    ),
    "a message of no kind": ({"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    "both ways to end": (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "exclude",
    ),
}


async def test_bad_chats(gateway: Gateway, http: httpx.AsyncClient) -> None:
    for name, (fields, param, mention) in BAD_CHATS.items():
        answer = await http.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})
        print(name, answer.text[:200])
        check_error(answer, 400, param, mention)
    assert gateway.scheduler.submits == []


async def test_malformed_bodies(http: httpx.AsyncClient) -> None:
    for content in ('{"prompt": ', "", "[]", '"text"', b"\xff\xfe", "[" * 100_000):
        answer = await http.post("/v1/completions", content=content)
        check_error(answer, 400, None, "body")


async def test_unknown_model_route_and_method(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/completions", json={**GENERATE, "model": "another"})
    check_error(answer, 404, None, "another")
    assert answer.json()["error"]["code"] == "model_not_found"
    check_error(await http.get("/v2/completions"), 404, None, "/v2/completions")
    check_error(await http.get("/v1/completions"), 405, None, "GET")


async def test_a_body_of_100_mb_is_refused_and_not_kept(
    gateway: Gateway, http: httpx.AsyncClient
) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"a" * 1_000_000
        yield b'"}'

    answer = await http.post("/v1/completions", content=body())
    check_error(answer, 413, None, "200000 bytes")
    await complete(http)


async def test_a_failing_template_is_told(tmp_path: Any) -> None:
    for path in DEMO_MODEL.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system role here') }}")
    async with (
        scripted_gateway(tmp_path, served_model_name="tale") as gateway,
        httpx.AsyncClient(base_url=gateway.url) as http,
    ):
        answer = await http.post("/v1/chat/completions", json={"messages": MESSAGES})
        check_error(answer, 400, "messages", "no system role here")
        assert (await http.get("/v1/models")).json()["data"][0]["id"] == "tale"


async def test_a_full_queue(gateway: Gateway, http: httpx.AsyncClient) -> None:
    def refuse(_: Submit) -> Finished:
        error = plan_pb2.Error(code="queue_full", message="the queue is full")
        return Finished(reason=mesh_pb2.END_REASON_ERROR, error=error, retry_after_ns=1_500_000_000)

    gateway.scheduler.refuse = refuse
    for stream in (False, True):
        answer = await http.post("/v1/completions", json={**GENERATE, "stream": stream})
        check_error(answer, 429, None, "queue is full")
        assert answer.headers["retry-after"] == "2"
        assert answer.json()["error"]["type"] == "rate_limit_error"


async def test_the_deadline_of_http() -> None:
    scheduler = ScriptedScheduler(gate=0)
    async with (
        scripted_gateway(DEMO_MODEL, scheduler, default_timeout_s=0.2) as gateway,
        httpx.AsyncClient(base_url=gateway.url) as http,
    ):
        check_error(await http.post("/v1/completions", json=GENERATE), 504, None, "deadline")
        await until(lambda: len(scheduler.aborts) == 1, "the abort")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_goes_away_cancels(
    gateway: Gateway, http: httpx.AsyncClient, stream: bool, n: int
) -> None:
    scheduler = gateway.scheduler
    scheduler.gate = 1
    body = {**GENERATE, "stream": stream, "n": n}
    task = asyncio.ensure_future(read_first(http, body))
    await until(lambda: len(scheduler.submits) == n, "the requests")
    task.cancel()
    await until(lambda: len(scheduler.aborts) == n, "the aborts")
    await until_metric(http, "stagemesh_requests_in_progress 0.0")
    assert f'outcome="cancelled"}} {n}.0' in (await http.get("/metrics")).text


async def until_metric(http: httpx.AsyncClient, line: str) -> None:
    async with asyncio.timeout(60):
        while line not in (await http.get("/metrics")).text:
            pass


async def read_first(http: httpx.AsyncClient, body: dict[str, Any]) -> None:
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        async for _ in answer.aiter_lines():
            pass


async def test_an_error_in_mid_stream_is_an_event(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    scheduler = gateway.scheduler
    scheduler.gate = 1
    stream = await client.completions.create(
        model="demo", prompt="x", stream=True, extra_body={"ignore_eos": True}
    )
    assert (await anext(stream)).choices[0].text
    error = plan_pb2.Error(code="not_finite", message="the numbers became NaN")
    scheduler.refuse = lambda _: Finished(reason=mesh_pb2.END_REASON_ERROR, error=error)
    scheduler.break_streams()
    with pytest.raises(openai.APIError, match="became NaN"):
        [_ async for _ in stream]
