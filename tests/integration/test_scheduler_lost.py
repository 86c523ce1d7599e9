"""The scheduler is killed or frozen in mid-stream, and another comes: every answer is the one that
would have come without, in tokens, text, log-probabilities, endings and usage.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from support.answers import Answer, Asking, post, post_stream
from support.paths import DEMO_MODEL
from support.template import fork_worker
from support.thorough import thorough

from benchmarks.recovery.part import until
from benchmarks.recovery.parts_mesh import MeshShape, PartsMesh
from protos import text_generation_pb2 as pb

pytestmark = pytest.mark.timeout(180)

SHAPE = MeshShape(model=DEMO_MODEL, stages=2, scheduler_options=("--settle", "200ms"))
LENGTH = 72
STORY = "Once upon a time there was a little girl who"


def ask(prompt: str = STORY, **fields: Any) -> pb.GenerateRequest:
    sampling = {"seed": 1, **fields.pop("sampling", {})}
    stopping = {"max_tokens": LENGTH, "ignore_eos": True, **fields.pop("stopping", {})}
    return pb.GenerateRequest(
        text=prompt,
        sampling=pb.SamplingParams(**sampling),
        stopping=pb.StoppingCriteria(**stopping),
        output=pb.OutputOptions(**fields.pop("output", {})),
    )


SEEDED = {"temperature": 0.9, "seed": 5}
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4}
GRID = [
    ask(sampling={"temperature": 0.0}),
    ask(sampling={"temperature": 0.0}, output={"logprobs": 3}),
    ask(sampling=SEEDED),
    ask(sampling={**SEEDED, "seed": 6, "top_k": 20, "top_p": 0.9, "min_p": 0.02}),
    ask(sampling={**SEEDED, **PENALTIES}),
    ask(sampling={"temperature": 0.0, **PENALTIES}, output={"logprobs": 0}),
    ask(sampling={**SEEDED, "seed": 7, "logit_bias": {300: 3.0, 301: -100.0}}),
    ask(sampling={**SEEDED, "seed": 8}, stopping={"ignore_eos": False}),
    ask(
        sampling={**SEEDED, "seed": 9},
        stopping={"ignore_eos": False, "min_tokens": 50, "include_stop_in_output": True},
    ),
    ask(
        sampling={**SEEDED, "seed": 10},
        stopping={"stop_token_ids": list(range(300, 512)), "min_tokens": 45},
    ),
    ask(
        sampling={**SEEDED, "seed": 11},
        output={"logprobs": 2, "prompt_logprobs": 4, "echo_prompt": True},
    ),
    ask("A dog " * 90, sampling={**SEEDED, "seed": 12}, output={"prompt_logprobs": 0}),
    ask("Tom and Lily", sampling={**SEEDED, "seed": 13}, output={"echo_prompt": True}),
]
CHOICES: dict[str, Any] = {
    "prompt": [STORY, "Tom said"],
    "n": 2,
    "max_tokens": LENGTH,
    "temperature": 1.0,
    "seed": 77,
    "logprobs": 2,
    "echo": True,
    "ignore_eos": True,
}
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hello"}],
    "n": 3,
    "max_tokens": LENGTH,
    "seed": 78,
    "logprobs": True,
    "top_logprobs": 1,
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PartsMesh]:
    mesh = PartsMesh(SHAPE, tmp_path_factory.mktemp("lost"), fork_worker)
    yield mesh
    print(mesh.describe())
    mesh.end()


@pytest.fixture
async def mesh(shared: PartsMesh) -> PartsMesh:
    """One for all tests: each leaves it whole."""
    await shared.start()
    return shared


async def with_stops(mesh: PartsMesh) -> list[pb.GenerateRequest]:
    """The grid, and requests that end at texts which come late in what the model says."""
    (plain,) = await Asking(mesh.target, [GRID[0]]).finish()
    late = [plain.text[at : at + 12] for at in range(len(plain.text) // 2, len(plain.text), 40)]
    return [
        *GRID,
        *(
            ask(sampling={"temperature": 0.0}, stopping={"stop": [text], "min_tokens": 20})
            for text in late
        ),
    ]


async def restart_scheduler(mesh: PartsMesh) -> None:
    mesh.scheduler.kill()
    mesh.scheduler.start()
    await mesh.scheduler.wait_ready()


async def http_answers(mesh: PartsMesh) -> list[Any]:
    url = f"http://{mesh.gateways[0].facts['http']}"
    return await asyncio.gather(
        post(url, "/v1/completions", CHOICES),
        post_stream(url, "/v1/completions", CHOICES),
        post(url, "/v1/chat/completions", CHAT),
        post_stream(url, "/v1/chat/completions", CHAT),
        post(url, "/v1/completions", {**CHOICES, "max_tokens": 0}),
    )


async def test_a_killed_scheduler_changes_no_answer(mesh: PartsMesh) -> None:
    requests = await with_stops(mesh)
    await Asking(mesh.target, requests).finish()  # what follows finds the prompts cached
    right = await Asking(mesh.target, requests).finish()
    half = sum(len(answer.token_ids) for answer in right) // 2
    for in_all in (0, half):
        asking = Asking(mesh.target, requests)
        await asking.until_tokens(in_all, each=1)
        await restart_scheduler(mesh)
        check(await asking.finish(), right, requests)
        await mesh.until_idle()


@thorough
async def test_a_killed_scheduler_changes_no_answer_over_http(mesh: PartsMesh) -> None:
    await http_answers(mesh)
    right = await http_answers(mesh)
    before = (await mesh.status()).queue.generated_tokens
    asking = asyncio.create_task(http_answers(mesh))
    await mesh.until(lambda s: s.queue.generated_tokens > before + 4 * LENGTH, "some tokens")
    await restart_scheduler(mesh)
    for answer, expected in zip(await asking, right, strict=True):
        assert answer == expected
    await mesh.until_idle()


async def test_twice_before_anything_came(mesh: PartsMesh) -> None:
    """The second scheduler dies before it has a pipeline, with all requests submitted to it."""
    right = await Asking(mesh.target, GRID).finish()
    asking = Asking(mesh.target, GRID)
    await asking.until_tokens(1)
    for _ in range(2):
        await restart_scheduler(mesh)
    check(await asking.finish(), right, GRID, cached=False)


async def test_a_frozen_scheduler_that_thaws(mesh: PartsMesh) -> None:
    """Beyond all leases: workers and gateway leave it, and come back once it moves again."""
    right = await Asking(mesh.target, GRID).finish()
    asking = Asking(mesh.target, GRID)
    await asking.until_tokens(100)
    mesh.scheduler.freeze()
    log = mesh.gateways[0].log
    await until(lambda: "was silent for" in log.read_text(), "the gateway to leave it")
    mesh.scheduler.thaw()
    check(await asking.finish(), right, GRID, cached=False)
    await mesh.until_idle()


def check(
    answers: list[Answer],
    right: list[Answer],
    requests: list[pb.GenerateRequest],
    *,
    cached: bool = True,
) -> None:
    for answer, expected, request in zip(answers, right, requests, strict=True):
        assert answer.summary is not None, request
        if not cached:
            for summary in (answer.summary, expected.summary):
                assert summary is not None
                summary["usage"].pop("cachedPromptTokens", None)
        assert answer == expected, request
