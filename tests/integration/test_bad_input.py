"""Bad input over gRPC: a clear error to the caller, and the mesh goes on."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from support.mesh import Mesh, greedy_request, running_mesh
from support.paths import DEMO_MODEL

from protos import text_generation_pb2 as pb

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with running_mesh(DEMO_MODEL, stages=2) as running:
        yield running


def sampling(**fields: float) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="Once", sampling=pb.SamplingParams(**fields))  # type: ignore[arg-type]


def stopping(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="Once", stopping=pb.StoppingCriteria(**fields))  # type: ignore[arg-type]


BAD = {
    "no prompt": (pb.GenerateRequest(), INVALID, "prompt"),
    "no token": (pb.GenerateRequest(token_ids=pb.TokenIds()), INVALID, "prompt"),
    "over the context": (greedy_request([5] * 5000, 4), INVALID, "5000"),
    "token out of range": (greedy_request([5, 10**6], 4), INVALID, "1000000"),
    "unknown model": (
        pb.GenerateRequest(text="Once", model="another"),
        grpc.StatusCode.NOT_FOUND,
        "another",
    ),
    "max_tokens 0": (stopping(max_tokens=0), INVALID, "max_tokens"),
    "NaN temperature": (sampling(temperature=float("nan")), INVALID, "temperature"),
    "negative temperature": (sampling(temperature=-1.0), INVALID, "temperature"),
    "top_p above 1": (sampling(top_p=1.5), INVALID, "top_p"),
    "infinite penalty": (sampling(presence_penalty=float("inf")), INVALID, "presence_penalty"),
    "10,000 stops": (stopping(stop=[f"s{i}" for i in range(10_000)]), INVALID, "stop"),
    "empty stop": (stopping(stop=[""]), INVALID, "stop"),
    "stop token out of range": (stopping(stop_token_ids=[10**6]), INVALID, "stop_token_ids"),
    "chat without messages": (pb.GenerateRequest(chat=pb.ChatPrompt()), INVALID, "message"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_request(mesh: Mesh, name: str) -> None:
    request, code, mentions = BAD[name]
    with pytest.raises(grpc.RpcError) as caught:
        mesh.generate(request)
    assert caught.value.code() == code
    assert mentions in caught.value.details()


def test_a_prompt_of_100_mb_is_refused(mesh: Mesh) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        mesh.generate(pb.GenerateRequest(text="a" * 100_000_000))
    assert caught.value.code() in {INVALID, grpc.StatusCode.RESOURCE_EXHAUSTED}


def test_a_deadline_ends_the_request(mesh: Mesh) -> None:
    request = greedy_request("Once upon a time", 400, ignore_eos=True)
    with pytest.raises(grpc.RpcError) as caught:
        list(mesh.stub.Generate(request, timeout=0.15))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    mesh.wait_idle()


def test_cancelling_frees_the_blocks(mesh: Mesh) -> None:
    call = mesh.start(greedy_request("Once upon a time", 400, ignore_eos=True))
    next(iter(call))
    assert mesh.status().queue.num_running == 1
    call.cancel()
    status = mesh.wait_idle()
    assert status.queue.num_aborted >= 1


def test_the_mesh_is_unharmed(mesh: Mesh) -> None:
    """Runs last in this module: whatever came before, requests are still served."""
    assert mesh.generate(greedy_request("Once", 8)).token_ids
    assert mesh.wait_idle().queue.num_failed <= 1  # the one that met its deadline
