"""What is resolved and refused before a request reaches the mesh."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.paths import DEMO_MODEL

from gateway.model import ServedModel
from gateway.prepare import Preparer, as_sent, check_shape, resolve_sampling
from gateway.requests import (
    ChatPrompt,
    GenerationRequest,
    SamplingOptions,
    StoppingOptions,
    TextPrompt,
    TokenPrompt,
)
from gateway.seeds import choice_seed
from stagemesh.errors import (
    CheckpointError,
    ContextLengthExceeded,
    InvalidRequest,
    RequestTooLarge,
    StageMeshError,
)
from stagemesh.sampling import SamplingSpec

MODEL = ServedModel.from_directory(DEMO_MODEL)
CONTEXT = 64


@pytest.fixture
def preparer() -> Iterator[Preparer]:
    with ThreadPoolExecutor(1) as executor:
        yield Preparer(MODEL, executor)


def tokens(*token_ids: int, **stopping: object) -> GenerationRequest:
    return GenerationRequest(TokenPrompt(token_ids), stopping=StoppingOptions(**stopping))  # type: ignore[arg-type]


async def test_request_then_model_then_default(preparer: Preparer) -> None:
    request = replace(tokens(5), sampling=SamplingOptions(temperature=0.25, seed=9))
    sampling = (await preparer.prepare(request, CONTEXT)).sampling
    assert sampling.temperature == 0.25
    assert sampling.top_p == pytest.approx(0.95)  # the model's
    assert sampling.frequency_penalty == 0.0
    assert sampling.seed == 9
    assert sampling.stop_token_ids == MODEL.eos_token_ids


def test_seeds() -> None:
    drawn = {resolve_sampling(MODEL, tokens(5)).seed for _ in range(8)}
    assert len(drawn) == 8
    assert all(0 <= seed < 2**64 for seed in drawn)
    negative = replace(tokens(5), sampling=SamplingOptions(seed=-1))
    assert resolve_sampling(MODEL, negative).seed == 2**64 - 1


def test_seeds_of_choices_are_fixed() -> None:
    """Written down: they must not change from one version to the next."""
    assert choice_seed(7, 0) == 7
    assert choice_seed(7, 1) == 0xCDA7975F1322F3E0
    assert len({choice_seed(7, choice) for choice in range(1000)}) == 1000


@pytest.mark.parametrize(("asked", "granted"), [(None, CONTEXT - 3), (5, 5), (10**9, CONTEXT - 3)])
async def test_max_tokens_is_what_the_context_leaves(
    preparer: Preparer, asked: int | None, granted: int
) -> None:
    prepared = await preparer.prepare(tokens(5, 6, 7, max_tokens=asked), CONTEXT)
    assert prepared.max_tokens == granted


TOO_LONG = TextPrompt("a" * 1_100_000)
BAD: list[tuple[GenerationRequest, type[StageMeshError], str]] = [
    (tokens(), InvalidRequest, "empty"),
    (GenerationRequest(TextPrompt("")), InvalidRequest, "empty"),
    (tokens(*[5] * CONTEXT), ContextLengthExceeded, f"{CONTEXT} tokens"),
    (GenerationRequest(TextPrompt("dog " * 900)), ContextLengthExceeded, f"can have {CONTEXT}"),
    (GenerationRequest(TOO_LONG), RequestTooLarge, "1100000 characters"),
    (GenerationRequest(ChatPrompt(())), InvalidRequest, "no messages"),
    (
        GenerationRequest(ChatPrompt(({"role": "user", "content": TOO_LONG.text},))),
        RequestTooLarge,
        "1100000 characters",
    ),
    (tokens(5, 2048), InvalidRequest, "2048"),
    (tokens(5, max_tokens=0), InvalidRequest, "max_tokens"),
    (tokens(5, stop=("x",) * 65), InvalidRequest, "stop has 65"),
    (tokens(5, stop_token_ids=tuple(range(1025))), InvalidRequest, "stop_token_ids"),
    (replace(tokens(5), sampling=SamplingOptions(seed=2**64)), InvalidRequest, "seed"),
    (replace(tokens(5), sampling=SamplingOptions(logit_bias={9999: 1})), InvalidRequest, "9999"),
    (replace(tokens(5), sampling=SamplingOptions(top_p=1e-300)), InvalidRequest, "top_p"),
]


@pytest.mark.parametrize(("request_", "kind", "mention"), BAD, ids=range(len(BAD)))
async def test_what_is_refused(
    preparer: Preparer, request_: GenerationRequest, kind: type[StageMeshError], mention: str
) -> None:
    with pytest.raises(kind, match=mention) as caught:
        await preparer.prepare(request_, CONTEXT)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"num_choices": 0}, "n"),
        ({"num_choices": 129}, "n"),
        ({"priority": 2**31}, "priority"),
        ({"request_id": "x" * 301}, "request_id"),
        ({"cache_salt": "x" * 301}, "cache_salt"),
    ],
)
def test_what_is_refused_before_anything_is_done(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_shape(replace(tokens(5), **fields))
    assert caught.value.param == param


async def test_long_texts_do_not_hold_the_event_loop(preparer: Preparer) -> None:
    text = "once upon a time " * 50_000
    task = asyncio.ensure_future(preparer.prompt_token_ids(TextPrompt(text)))
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 10
    assert len((await task)[0]) > 50_000


def test_numbers_are_those_that_travel() -> None:
    assert as_sent(SamplingSpec(top_p=0.1)).top_p == 0.10000000149011612


def copy_of_demo(directory: Path, **files: object) -> Path:
    for path in DEMO_MODEL.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, directory / path.name)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_a_bad_generation_config_is_named(tmp_path: Path) -> None:
    copy_of_demo(tmp_path, generation_config={"eos_token_id": [1, 2], "top_p": 7})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p"):
        ServedModel.from_directory(tmp_path)


def test_what_a_directory_says(tmp_path: Path) -> None:
    copy_of_demo(tmp_path, generation_config={"eos_token_id": [1, 2], "top_k": -1})
    model = ServedModel.from_directory(tmp_path)
    assert model.name == tmp_path.name
    assert model.eos_token_ids == (1, 2)
    assert model.default_sampling.top_k == 0


@pytest.mark.parametrize("template", [None, "{% for %}"])
async def test_without_a_usable_template_only_chats_fail(
    tmp_path: Path, template: str | None
) -> None:
    copy_of_demo(tmp_path, tokenizer_config={"bos_token": "<s>", "chat_template": template})
    chat = ChatPrompt(({"role": "user", "content": "x"},))
    with ThreadPoolExecutor(1) as executor:
        preparer = Preparer(ServedModel.from_directory(tmp_path), executor)
        with pytest.raises(InvalidRequest, match="chat template"):
            await preparer.prepare(GenerationRequest(chat), CONTEXT)
        assert (await preparer.prepare(tokens(5), CONTEXT)).prompt_token_ids == (5,)
