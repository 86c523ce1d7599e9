"""Nobody takes the lost place: requests wait until their deadline, or the others take it over."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Sequence

import grpc
import pytest
from support.chaos import DEMO_MODEL, MANY, NUM_LASTING, WAITING, Meshes, loaded, watched

from benchmarks.recovery.load import Ask, Load, Stream, Truth, asks
from benchmarks.recovery.parts_mesh import MeshShape, PartsMesh

pytestmark = pytest.mark.timeout(180)

IMPATIENT = MeshShape(
    model=DEMO_MODEL,
    stages=2,
    scheduler_options=WAITING,
    gateway_options=("--default-timeout", "2500ms"),
)
TAKING_OVER = MeshShape(
    model=DEMO_MODEL,
    stages=3,
    scheduler_options=("--takeover-after", "1s"),
    may_be_recut=True,
)
FEW = MANY[:12]
ENDLESS = tuple(asks(4, 5, prompt_tokens=(5, 40), max_tokens=440))


@pytest.mark.parametrize("timeout_s", [None, 2.0], ids=["the gateway's", "the client's"])
async def test_the_deadline_passes_while_no_replacement_comes(
    meshes: Meshes, truth: Truth, timeout_s: float | None
) -> None:
    """What was streamed is right, and the error says that it may be tried again, and when."""
    async with watched(meshes.get(IMPATIENT)) as mesh:
        streams = await cut_short(mesh, ENDLESS, timeout_s)
        await mesh.until(lambda s: s.queue.num_waiting == 0, "the requests to be given up")
        await mesh.restore()
        # Right as far as they came: learnt when the mesh serves again, in time this time.
        for stream in streams:
            beginning = Ask(stream.ask.prompt, len(stream.token_ids), stream.ask.seed)
            await truth.learn(mesh.target, [beginning])
            assert stream.token_ids == truth.tokens(beginning)
            assert stream.code is grpc.StatusCode.UNAVAILABLE, stream.error
            assert int(stream.trailers["retry-after-ms"]) > 0


async def test_a_deadline_over_http(meshes: Meshes) -> None:
    async with watched(meshes.get(IMPATIENT)) as mesh:
        mesh.at(await mesh.status(), 1).kill()
        url = f"http://{mesh.gateways[0].facts['http']}/v1/completions"
        status, retry_after, body = await asyncio.to_thread(post, url, "Once upon a time")
        assert (status, body["error"]["type"]) == (503, "service_unavailable"), body
        assert int(retry_after) > 0


async def test_the_others_take_the_layers_over(meshes: Meshes, truth: Truth) -> None:
    async with watched(meshes.get(TAKING_OVER)) as mesh, loaded(mesh, truth, FEW) as load:
        mesh.at(await mesh.status(), 1).kill()
        await mesh.until(lambda s: len(s.pipelines[0].worker_ids) == 2, "two stages")
        await load.until_more_tokens(NUM_LASTING)


async def cut_short(
    mesh: PartsMesh, wanted: Sequence[Ask], timeout_s: float | None
) -> list[Stream]:
    async with Load(mesh.target, wanted, timeout_s=timeout_s) as load:
        await load.until_tokens(2)
        mesh.at(await mesh.status(), 1).kill()
        await load.finish()
    return load.streams


def post(url: str, prompt: str) -> tuple[int, str, dict[str, dict[str, str]]]:
    """(status, Retry-After, body)"""
    body = json.dumps({"model": "demo", "prompt": prompt, "max_tokens": 400}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60.0) as reply:
            return reply.status, "", json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers.get("Retry-After", ""), json.load(error)
