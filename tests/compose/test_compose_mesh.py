"""`docker compose up` on a real engine: it serves, to this host and to others."""

from __future__ import annotations

import json
import urllib.request

import grpc
import pytest
from support.containers import TEST_TIMEOUT_S, Project, docker, running_project
from support.mesh import Output, collect, greedy_request

pytestmark = [pytest.mark.compose, pytest.mark.timeout(TEST_TIMEOUT_S)]

PROMPT = "Once upon a time"
NUM_TOKENS = 32
REQUEST_TIMEOUT_S = 90.0


@pytest.fixture(scope="module")
def expected(mesh: Project) -> Output:
    return generate(mesh)


def generate(mesh: Project) -> Output:
    with grpc.insecure_channel(mesh.address("gateway", 50051)) as channel:
        request = greedy_request(PROMPT, NUM_TOKENS, ignore_eos=True)
        return collect(mesh.stub(channel).Generate(request, timeout=REQUEST_TIMEOUT_S))


def test_grpc_from_this_host(expected: Output) -> None:
    assert len(expected.token_ids) == NUM_TOKENS
    assert expected.text


def test_http_from_this_host(mesh: Project, expected: Output) -> None:
    body = {
        "model": "demo",
        "prompt": PROMPT,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"http://{mesh.address('gateway', 8000)}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
        reply = json.load(response)
    assert reply["choices"][0]["text"] == expected.text
    assert reply["usage"]["completion_tokens"] == NUM_TOKENS


def test_grpc_from_another_network(mesh: Project, expected: Output) -> None:
    """From a container that shares no network with the mesh, through the port of this host."""
    (bridge,) = json.loads(docker("network", "inspect", "bridge"))
    (subnet, *_) = bridge["IPAM"]["Config"]
    port = mesh.address("gateway", 50051).rpartition(":")[2]
    target = f"{subnet['Gateway']}:{port}"
    options = ("--temperature", "0", "--max-tokens", "5", "--target", target)
    text = docker("run", "--rm", "stagemesh-control", "generate", PROMPT, *options)
    assert text.strip()
    assert expected.text.startswith(text.rstrip("\n"))


def test_a_spare_stands_by(mesh: Project) -> None:
    mesh.wait_whole(num_stages=3, num_spares=1)
    spans = {(worker.span.start, worker.span.end) for worker in mesh.status().workers}
    assert len(spans - {(0, 0)}) == 3


def test_health_checks_of_the_engine_pass(mesh: Project) -> None:
    for service, num in (("scheduler", 1), ("gateway", 1), ("stage_worker", 4)):
        mesh.wait_healthy(service, num)


def test_without_a_number_of_stages_all_workers_are_stages(images: None) -> None:
    variables = {"STAGES": "0", "WORKERS": "2"}
    with running_project(variables, num_stages=2) as other:
        assert len(other.status().workers) == 2
        assert len(generate(other).token_ids) == NUM_TOKENS
