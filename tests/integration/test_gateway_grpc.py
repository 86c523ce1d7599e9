"""TextGeneration with a plain grpcio client, against a gateway whose scheduler is scripted."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.paths import DEMO_MODEL
from support.scripted_scheduler import (
    Finished,
    Gateway,
    ScriptedScheduler,
    Submit,
    running_gateway,
    scripted_gateway,
    served,
    until,
)

from gateway.tokenizer import Tokenizer
from protos import mesh_pb2, plan_pb2
from protos import text_generation_pb2 as pb
from protos import text_generation_pb2_grpc as pb_grpc

TOKENIZER = Tokenizer.from_directory(DEMO_MODEL)
TEXT = "Once upon a time there was a 🦙, and it said naïve things."
TEXT_IDS = list(TOKENIZER.encode(TEXT, add_special_tokens=False))
Code = grpc.StatusCode


def say_text(submit: Submit) -> list[int]:
    """TEXT, then the end token."""
    return [*TEXT_IDS, *submit.sampling.stop_token_ids[-1:], 5, 6, 7]


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    async with scripted_gateway(DEMO_MODEL) as running:
        yield running


@pytest.fixture
async def stub(gateway: Gateway) -> AsyncIterator[pb_grpc.TextGenerationStub]:
    async with grpc.aio.insecure_channel(gateway.grpc) as channel:
        yield pb_grpc.TextGenerationStub(channel)


def ask(prompt: str = "Once", **fields: object) -> pb.GenerateRequest:
    stopping = fields.pop("stopping", None) or pb.StoppingCriteria(max_tokens=4)
    return pb.GenerateRequest(text=prompt, stopping=stopping, **fields)  # type: ignore[arg-type]


async def collect(
    call: AsyncIterator[pb.GenerateResponse],
) -> tuple[list[pb.TokenDelta], pb.GenerationSummary]:
    responses = [response async for response in call]
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds == ["delta"] * (len(kinds) - 1) + ["summary"]
    deltas = [response.delta for response in responses[:-1]]
    position = 0
    for delta in deltas:
        assert delta.index == position
        position += len(delta.token_ids)
    assert responses[-1].summary.usage.completion_tokens == position
    return deltas, responses[-1].summary


def text_of(deltas: list[pb.TokenDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def ids_of(deltas: list[pb.TokenDelta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


async def fails(call: AsyncIterator[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [_ async for _ in call]
    return caught.value


async def test_text_comes_whole_and_ends_at_the_end_token(gateway: Gateway, stub) -> None:  # type: ignore[no-untyped-def]
    gateway.scheduler.script = say_text
    request = ask("Tell", stopping=pb.StoppingCriteria(), request_id="mine")
    deltas, summary = await collect(stub.Generate(request))
    assert text_of(deltas) == TEXT
    assert ids_of(deltas) == [*TEXT_IDS, *gateway.scheduler.submits[0].sampling.stop_token_ids]
    assert summary.finish_reason == pb.FINISH_REASON_STOP
    assert summary.stop_token_id == ids_of(deltas)[-1]
    assert summary.usage.prompt_tokens == len(TOKENIZER.encode("Tell"))
    assert summary.usage.cached_prompt_tokens == 2
    assert summary.request_id == "mine"
    assert 0 < summary.timings.first_token_ns <= summary.timings.total_ns
    assert gateway.scheduler.submits[0].label == "mine"
    assert not gateway.scheduler.aborts


async def test_what_the_scheduler_is_told(gateway: Gateway, stub) -> None:  # type: ignore[no-untyped-def]
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[7, 8, 9]),
        sampling=pb.SamplingParams(top_k=5, seed=2**64 - 1, logit_bias={3: -1.5}),
        stopping=pb.StoppingCriteria(max_tokens=2, min_tokens=1, stop_token_ids=[11]),
        priority=-3,
    )
    _, summary = await collect(stub.Generate(request, timeout=60.0))
    (submit,) = gateway.scheduler.submits
    assert list(submit.prompt_token_ids) == [7, 8, 9]
    assert submit.sampling.seed == summary.seed == 2**64 - 1
    assert submit.sampling.top_k == 5
    assert dict(submit.sampling.logit_bias) == {3: -1.5}
    # From the model's generation_config.json.
    assert submit.sampling.temperature == pytest.approx(0.8)
    assert submit.sampling.top_p == pytest.approx(0.95)
    assert submit.sampling.presence_penalty == 0.0
    assert list(submit.sampling.stop_token_ids) == [11, 1]
    assert (submit.max_tokens, submit.priority, submit.attempt) == (2, -3, 1)
    assert 50e9 < submit.remaining_ns <= 60.6e9  # gRPC rounds up


async def test_ignore_eos_and_what_the_context_leaves(gateway: Gateway, stub) -> None:  # type: ignore[no-untyped-def]
    stopping = pb.StoppingCriteria(ignore_eos=True)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7] * 500), stopping=stopping)
    deltas, summary = await collect(stub.Generate(request))
    assert not gateway.scheduler.submits[0].sampling.stop_token_ids
    assert len(ids_of(deltas)) == gateway.scheduler.submits[0].max_tokens == 12
    assert summary.finish_reason == pb.FINISH_REASON_LENGTH
    assert summary.WhichOneof("stop_cause") is None


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_text_aborts_in_the_mesh(gateway: Gateway, stub, include: bool) -> None:  # type: ignore[no-untyped-def]
    gateway.scheduler.script = say_text
    gateway.scheduler.gate = len(TEXT_IDS) - 3
    stopping = pb.StoppingCriteria(stop=["no such", "a 🦙, a"], include_stop_in_output=include)
    deltas, summary = await collect(stub.Generate(ask(stopping=stopping)))
    end = "Once upon a time there was "
    assert text_of(deltas) == (end + "a 🦙, a" if include else end)
    assert (summary.finish_reason, summary.stop_text) == (pb.FINISH_REASON_STOP, "a 🦙, a")
    shown = ids_of(deltas)
    assert shown == TEXT_IDS[: len(shown)]
    assert "a 🦙, a" in TOKENIZER.decode(shown)
    assert "a 🦙, a" not in TOKENIZER.decode(shown[:-1])
    await until(lambda: gateway.scheduler.aborts != [], "the abort")


async def test_stop_token_text_is_shown_where_asked_for(gateway: Gateway, stub) -> None:  # type: ignore[no-untyped-def]
    gateway.scheduler.script = say_text
    stopping = pb.StoppingCriteria(include_stop_in_output=True)
    deltas, _ = await collect(stub.Generate(ask(stopping=stopping)))
    assert text_of(deltas) == TEXT + TOKENIZER.eos_token


async def test_echo_and_logprobs(gateway: Gateway, stub) -> None:  # type: ignore[no-untyped-def]
    output = pb.OutputOptions(logprobs=2, prompt_logprobs=1, echo_prompt=True)
    deltas, _ = await collect(stub.Generate(ask("Once upon", output=output)))
    prompt = deltas[0].prompt
    assert prompt.text == "Once upon"
    assert list(prompt.token_ids) == list(TOKENIZER.encode("Once upon"))
    assert len(prompt.logprobs) == len(prompt.token_ids)
    assert not prompt.logprobs[0].HasField("chosen")
    assert [entry.chosen.token_id for entry in prompt.logprobs[1:]] == list(prompt.token_ids)[1:]
    logprobs = [entry for delta in deltas for entry in delta.logprobs]
    assert [entry.chosen.token_id for entry in logprobs] == ids_of(deltas)
    assert [len(entry.alternatives) for entry in logprobs] == [2] * 4
    assert logprobs[0].chosen.text == TOKENIZER.token_text.text_of(ids_of(deltas)[0])
    assert not any(delta.HasField("prompt") for delta in deltas[1:])


async def test_chat(gateway: Gateway, stub) -> None:  # type: ignore[no-untyped-def]
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="Hello")])
    stopping = pb.StoppingCriteria(max_tokens=1)
    await collect(stub.Generate(pb.GenerateRequest(chat=chat, stopping=stopping)))
    expected = TOKENIZER.encode(f"{TOKENIZER.bos_token}Hello", add_special_tokens=False)
    assert tuple(gateway.scheduler.submits[0].prompt_token_ids) == expected
    tokenized = await stub.Tokenize(pb.TokenizeRequest(chat=chat))
    assert tuple(tokenized.token_ids) == expected


async def test_get_model_tokenize_detokenize(gateway: Gateway, stub) -> None:  # type: ignore[no-untyped-def]
    await until_serving(gateway)
    model = await stub.GetModel(pb.GetModelRequest())
    assert (model.model, model.identity, model.max_model_len) == ("demo", "cafe", 512)
    assert list(model.eos_token_ids) == [1]
    assert model.has_chat_template
    assert model.default_sampling.temperature == pytest.approx(0.8)
    answer = await stub.Tokenize(pb.TokenizeRequest(text=TEXT))
    assert list(answer.token_ids) == [0, *TEXT_IDS]
    bare = await stub.Tokenize(pb.TokenizeRequest(text=TEXT, add_special_tokens=False))
    assert list(bare.token_ids) == TEXT_IDS
    back = pb.DetokenizeRequest(token_ids=answer.token_ids, skip_special_tokens=True)
    assert (await stub.Detokenize(back)).text == TEXT
    with pytest.raises(grpc.aio.AioRpcError, match="outside the vocabulary"):
        await stub.Detokenize(pb.DetokenizeRequest(token_ids=[10**6]))
    for call in (
        stub.GetModel(pb.GetModelRequest(model="x")),
        stub.Tokenize(pb.TokenizeRequest(model="x", text="y")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == Code.NOT_FOUND


async def check_health(gateway: Gateway, service: str) -> int:
    async with grpc.aio.insecure_channel(gateway.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


async def until_serving(gateway: Gateway, wanted: int = 1) -> None:
    async with asyncio.timeout(60):
        while await check_health(gateway, "stagemesh.v1.TextGeneration") != wanted:
            pass


async def test_health_and_reflection(gateway: Gateway) -> None:
    await until_serving(gateway)
    await gateway.scheduler.set_serving(False)
    await until_serving(gateway, health_pb2.HealthCheckResponse.NOT_SERVING)
    assert await check_health(gateway, "") == health_pb2.HealthCheckResponse.SERVING
    await gateway.scheduler.set_serving(True)
    await until_serving(gateway)
    async with grpc.aio.insecure_channel(gateway.grpc) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = [r async for r in stub.ServerReflectionInfo(iter([question]))]
    names = {service.name for service in answer.list_services_response.service}
    assert {"stagemesh.v1.TextGeneration", "grpc.health.v1.Health"} <= names


def queue_full(_: Submit) -> Finished:
    return Finished(
        reason=mesh_pb2.END_REASON_ERROR,
        error=plan_pb2.Error(code="queue_full", message="1024 requests wait"),
        retry_after_ns=1_500_000_000,
    )


async def test_a_full_queue_of_the_scheduler(gateway: Gateway, stub) -> None:  # type: ignore[no-untyped-def]
    gateway.scheduler.refuse = queue_full
    error = await fails(stub.Generate(ask()))
    assert error.code() == Code.RESOURCE_EXHAUSTED
    assert "1024 requests wait" in str(error.details())
    assert ("retry-after-ms", "1500") in [tuple(item) for item in error.trailing_metadata()]


async def test_a_full_gateway_refuses_at_once() -> None:
    scheduler = ScriptedScheduler(gate=0)
    async with (
        scripted_gateway(DEMO_MODEL, scheduler, max_concurrent_requests=2) as gateway,
        grpc.aio.insecure_channel(gateway.grpc) as channel,
    ):
        stub = pb_grpc.TextGenerationStub(channel)
        held = [asyncio.ensure_future(collect(stub.Generate(ask()))) for _ in range(2)]
        await until(lambda: len(scheduler.submits) == 2, "two requests")
        assert (await fails(stub.Generate(ask()))).code() == Code.RESOURCE_EXHAUSTED
        await scheduler.open_gate(None)
        await asyncio.gather(*held)
        await collect(stub.Generate(ask()))


async def test_cancelling_the_call_cancels_in_the_mesh(gateway: Gateway, stub) -> None:  # type: ignore[no-untyped-def]
    gateway.scheduler.gate = 1
    call = stub.Generate(ask())
    await anext(aiter(call))
    call.cancel()
    submits, aborts = gateway.scheduler.submits, gateway.scheduler.aborts
    await until(lambda: aborts == [submits[0].request], "the abort")


async def test_the_deadline_of_the_call_is_the_request_s(gateway: Gateway, stub) -> None:  # type: ignore[no-untyped-def]
    gateway.scheduler.gate = 1
    error = await fails(stub.Generate(ask(), timeout=0.3))
    assert error.code() == Code.DEADLINE_EXCEEDED
    await until(lambda: gateway.scheduler.aborts != [], "the abort")


async def test_a_slow_reader_gets_all_tokens_in_fewer_deltas(gateway: Gateway) -> None:
    """What a connection does not hold is merged: the gateway writes no faster than is read."""
    stopping = pb.StoppingCriteria(max_tokens=500, ignore_eos=True)
    request = ask("Once", stopping=stopping, output=pb.OutputOptions(logprobs=20))
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 2**16)]
    async with grpc.aio.insecure_channel(gateway.grpc, options=small_window) as channel:
        call = pb_grpc.TextGenerationStub(channel).Generate(request)
        await until(lambda: gateway.scheduler.num_finished == 1, "the mesh to finish")
        deltas, _ = await collect(call)
    assert len(ids_of(deltas)) == 500
    print(len(deltas), "deltas")
    assert len(deltas) < 400


BAD: list[tuple[pb.GenerateRequest, grpc.StatusCode, str]] = [
    (pb.GenerateRequest(), Code.INVALID_ARGUMENT, "no prompt"),
    (pb.GenerateRequest(text=""), Code.INVALID_ARGUMENT, "empty"),
    (pb.GenerateRequest(token_ids=pb.TokenIds()), Code.INVALID_ARGUMENT, "empty"),
    (ask(model="another"), Code.NOT_FOUND, "another"),
    (ask(sampling=pb.SamplingParams(temperature=math.nan)), Code.INVALID_ARGUMENT, "temperature"),
    (ask(request_id="x" * 1000), Code.INVALID_ARGUMENT, "request_id"),
    (ask("a" * 2_000_000), Code.INVALID_ARGUMENT, "2000000 characters"),
    (ask("a" * 100_000_000), Code.RESOURCE_EXHAUSTED, "larger than max"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
async def test_bad_requests(gateway: Gateway, stub, number: int) -> None:  # type: ignore[no-untyped-def]
    request, code, mention = BAD[number]
    error = await fails(stub.Generate(request))
    assert error.code() == code
    assert mention in str(error.details())
    assert not gateway.scheduler.submits
    await collect(stub.Generate(ask()))


BAD_CODES = {"not_finite": Code.INTERNAL, "mesh_unavailable": Code.UNAVAILABLE}


@pytest.mark.parametrize("code", BAD_CODES)
async def test_errors_of_the_mesh_reach_the_caller(gateway: Gateway, stub, code: str) -> None:  # type: ignore[no-untyped-def]
    error = plan_pb2.Error(code=code, message="what happened")
    gateway.scheduler.refuse = lambda _: Finished(reason=mesh_pb2.END_REASON_ERROR, error=error)
    caught = await fails(stub.Generate(ask()))
    assert (caught.code(), caught.details()) == (BAD_CODES[code], "what happened")


# ---- the link to the scheduler ----


async def test_a_stream_goes_on_after_the_link_broke(gateway: Gateway, stub) -> None:  # type: ignore[no-untyped-def]
    scheduler = gateway.scheduler
    scheduler.gate, scheduler.repeats = 2, 1
    output = pb.OutputOptions(prompt_logprobs=0)
    call = aiter(stub.Generate(ask(output=output)))
    seen: list[int] = []
    while len(seen) < 2:
        seen += (await anext(call)).delta.token_ids
    scheduler.break_streams()
    await until(lambda: len(scheduler.submits) == 2, "the second attempt")
    first, second = scheduler.submits
    assert second.attempt > first.attempt
    assert list(second.prompt_token_ids) == list(first.prompt_token_ids)
    assert list(second.output_token_ids) == scheduler.script(first)[:2]
    assert second.sampling.seed == first.sampling.seed
    assert not second.sampling.HasField("num_prompt_logprobs")
    await scheduler.open_gate(None)
    *deltas, last = [response async for response in call]
    assert seen + ids_of([response.delta for response in deltas]) == scheduler.script(first)
    assert last.summary.finish_reason == pb.FINISH_REASON_LENGTH


async def test_an_idle_gateway_shows_that_it_lives(gateway: Gateway) -> None:
    await until(lambda: gateway.scheduler.num_heartbeats >= 3, "heartbeats")


async def test_only_a_scheduler_of_no_lower_term_is_followed(gateway: Gateway, stub) -> None:  # type: ignore[no-untyped-def]
    scheduler = gateway.scheduler
    scheduler.gate, scheduler.term = 0, 5
    await restarted(scheduler)
    task = asyncio.ensure_future(collect(stub.Generate(ask())))
    await until(lambda: len(scheduler.submits) == 1, "the request")
    scheduler.term = 4
    await restarted(scheduler)
    await restarted(scheduler)
    assert len(scheduler.submits) == 1
    scheduler.term = 6
    await scheduler.open_gate(None)
    await task
    assert [submit.attempt for submit in scheduler.submits] == [1, 2]


async def restarted(scheduler: ScriptedScheduler) -> None:
    """The stream breaks, and the gateway has tried another."""
    before = scheduler.num_attached
    scheduler.break_streams()
    await until(lambda: scheduler.num_attached > before, "another stream")


async def test_a_request_in_flight_waits_out_a_full_queue(gateway: Gateway, stub) -> None:  # type: ignore[no-untyped-def]
    scheduler = gateway.scheduler
    scheduler.gate = 1
    call = aiter(stub.Generate(ask()))
    await anext(call)
    scheduler.refuse = lambda submit: queue_full(submit) if submit.attempt < 4 else None
    scheduler.break_streams()
    await until(lambda: len(scheduler.submits) == 4, "attempts until one is taken")
    await scheduler.open_gate(None)
    *_, last = [response async for response in call]
    assert last.summary.usage.completion_tokens == 4


async def test_a_lost_finish_is_made_up_for() -> None:
    """All tokens had come when the link broke: the request is not run again."""
    scheduler = ScriptedScheduler()
    lost = asyncio.Event()

    class Losing(ScriptedScheduler):
        async def _run(self, submit, events):  # type: ignore[no-untyped-def]
            for index, token in enumerate(self.script(submit)):
                events.put_nowait(self._tokens(submit, index, token))
            events.put_nowait(None)
            lost.set()

    scheduler = Losing()
    async with (
        scripted_gateway(DEMO_MODEL, scheduler) as gateway,
        grpc.aio.insecure_channel(gateway.grpc) as channel,
    ):
        deltas, summary = await collect(pb_grpc.TextGenerationStub(channel).Generate(ask()))
    assert lost.is_set()
    assert len(ids_of(deltas)) == 4
    assert summary.finish_reason == pb.FINISH_REASON_LENGTH
    assert len(scheduler.submits) == 1


async def test_requests_wait_for_a_scheduler_but_not_without_end() -> None:
    scheduler = ScriptedScheduler()
    async with served(scheduler) as (server, address):
        await server.stop(0)
        async with (
            running_gateway(DEMO_MODEL, address, scheduler, max_unavailable_s=0.3) as gateway,
            grpc.aio.insecure_channel(gateway.grpc) as channel,
        ):
            stub = pb_grpc.TextGenerationStub(channel)
            error = await fails(stub.Generate(ask()))
            assert error.code() == Code.UNAVAILABLE
            assert "scheduler" in str(error.details())


async def test_a_request_from_before_the_scheduler_is_served() -> None:
    scheduler = ScriptedScheduler()
    async with served(scheduler) as (server, address):
        await server.stop(0)
        async with (
            running_gateway(DEMO_MODEL, address, scheduler) as gateway,
            grpc.aio.insecure_channel(gateway.grpc) as channel,
        ):
            task = asyncio.ensure_future(
                collect(pb_grpc.TextGenerationStub(channel).Generate(ask()))
            )
            async with served(scheduler, address):
                deltas, _ = await task
    assert len(ids_of(deltas)) == 4
