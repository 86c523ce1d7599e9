"""`docker compose up` on a real engine: it serves, and serves again after its containers were
stopped, killed and added.
"""

from __future__ import annotations

import itertools
import json
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import grpc
import pytest
from support.containers import (
    TEST_TIMEOUT_S,
    Project,
    docker,
    inspect,
    kill_hard,
    wait_restarted,
)
from support.mesh import Output, collect, greedy_request, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.timeout(TEST_TIMEOUT_S)]

PROMPT = "Once upon a time"
NUM_TOKENS = 32
# Takes some seconds; the kill is sent after the first of them.
LONG_NUM_TOKENS = 480
REQUEST_TIMEOUT_S = 90.0


@pytest.fixture(scope="module")
def mesh(images: None) -> Iterator[Project]:
    """Two workers, as `docker compose up` starts them."""
    with closing(_up(num_workers=2)) as running:
        yield from running


def _up(num_workers: int) -> Iterator[Project]:
    project = Project()
    try:
        project.up(num_workers=num_workers)
        project.wait_serving(num_stages=num_workers)
        yield project
        print(project.logs())
    finally:
        project.down()
    assert project.leftovers() == []


@pytest.fixture(scope="module")
def expected(mesh: Project) -> Output:
    return generate(mesh)


def generate(
    mesh: Project, num_tokens: int = NUM_TOKENS, on_first: Callable[[], None] | None = None
) -> Output:
    """`on_first` is called when the first message of the stream has come."""
    with grpc.insecure_channel(mesh.address("gateway", 50051)) as channel:
        request = greedy_request(PROMPT, num_tokens, ignore_eos=True)
        call = mesh.stub(channel).Generate(request, timeout=REQUEST_TIMEOUT_S)
        first = next(call)
        if on_first is not None:
            on_first()
        return collect(itertools.chain([first], call))


def generate_meanwhile(mesh: Project, repair: Callable[[], None]) -> Output:
    """The answer to a request that is made first and can be computed only after `repair`."""
    accepted = mesh.status().queue.num_accepted
    with ThreadPoolExecutor(max_workers=1) as pool:
        answer = pool.submit(generate, mesh)
        arrived = f"the request to reach the scheduler ({accepted} before)"
        wait_until(lambda: mesh.status().queue.num_accepted > accepted, 30.0, arrived)
        assert not answer.done()
        repair()
        return answer.result(timeout=REQUEST_TIMEOUT_S)


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


def test_health_checks_of_the_engine_pass(mesh: Project) -> None:
    for service, num in (("scheduler", 1), ("gateway", 1), ("stage_worker", 2)):
        mesh.wait_healthy(service, num)


def test_a_stopped_worker_ends_well_and_serves_again_when_started(
    mesh: Project, expected: Output
) -> None:
    worker, *_ = mesh.containers("stage_worker")
    docker("stop", worker)
    assert inspect(worker)["State"]["ExitCode"] == 0
    output = generate_meanwhile(mesh, lambda: docker("start", worker) and None)
    assert output.token_ids == expected.token_ids


@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_worker_is_restarted_and_serves_again(
    mesh: Project, expected: Output, which: int
) -> None:
    worker = mesh.containers("stage_worker")[which]
    pid = inspect(worker)["State"]["Pid"]
    kill_hard(worker)
    assert generate(mesh).token_ids == expected.token_ids
    wait_restarted(worker, pid)


def test_a_stream_goes_on_when_a_worker_is_killed(mesh: Project) -> None:
    undisturbed = generate(mesh, LONG_NUM_TOKENS)
    worker = mesh.containers("stage_worker")[1]
    epoch = mesh.status().pipelines[0].epoch.n
    output = generate(mesh, LONG_NUM_TOKENS, on_first=lambda: kill_hard(worker))
    assert output.token_ids == undisturbed.token_ids
    assert output.text == undisturbed.text
    assert mesh.status().pipelines[0].epoch.n > epoch


def test_a_restarted_scheduler_serves_again(mesh: Project, expected: Output) -> None:
    mesh.compose("restart", "scheduler")
    mesh.wait_serving(num_stages=2)
    assert generate(mesh).token_ids == expected.token_ids


def test_a_worker_more_takes_the_place_of_one_that_is_stopped(
    mesh: Project, expected: Output
) -> None:
    first, *_ = mesh.containers("stage_worker")
    mesh.up(num_workers=3)
    wait_until(lambda: len(mesh.status().workers) == 3, 60.0, "the third worker to register")
    assert generate(mesh).token_ids == expected.token_ids
    docker("stop", first)
    assert generate(mesh).token_ids == expected.token_ids


def test_three_workers_at_once_are_three_stages(images: None) -> None:
    with closing(_up(num_workers=3)) as running:
        mesh = next(running)
        spans = {(worker.span.start, worker.span.end) for worker in mesh.status().workers}
        assert len(spans) == 3
        assert len(generate(mesh).token_ids) == NUM_TOKENS
        next(running, None)
