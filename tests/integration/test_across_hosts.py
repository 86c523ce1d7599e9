"""The commands of docs/running-across-hosts.md, on hosts that are network namespaces."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hosts import Host, describe, hosts, wait_for_stages
from support.paths import DEMO_MODEL
from support.waiting import wait_until

pytestmark = pytest.mark.timeout(240)

MODEL = str(DEMO_MODEL)
QUESTION = ("Once upon a time", "--temperature", "0", "--max-tokens", "24")


@dataclass
class Lab:
    """Scheduler and gateway on `front`, a worker on each of `workers`, and somebody's `laptop`."""

    front: Host
    workers: list[Host]
    laptop: Host

    @property
    def scheduler(self) -> str:
        return f"{self.front.address}:50050"

    def ask(self) -> str:
        return self.laptop.run("generate", *QUESTION, "--target", f"{self.front.address}:50051")

    def start_worker(self, host: Host, model: str = MODEL) -> None:
        host.start("worker", "worker", "--scheduler", self.scheduler, "--model", model)

    def num_workers(self) -> int:
        status = self.front.status(self.scheduler)
        return -1 if status is None else len(status.workers)

    def num_accepted(self) -> int:
        """Requests, since the scheduler started."""
        status = self.front.status(self.scheduler)
        assert status is not None
        return status.queue.num_accepted


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with hosts(5, tmp_path_factory.mktemp("hosts")) as (front, first, second, spare, laptop):
        made = Lab(front, [first, second, spare], laptop)
        front.start("scheduler", "scheduler", "--stages", "2")
        front.start("gateway", "gateway", "--model", MODEL)
        for host in (first, second):
            made.start_worker(host)
        try:
            wait_for_stages(front, made.scheduler, 2)
            yield made
        finally:
            print(front.logs())


@pytest.fixture(scope="module")
def expected(lab: Lab) -> str:
    return lab.ask()


def test_each_worker_is_known_by_an_address_that_others_reach(lab: Lab, expected: str) -> None:
    status = wait_for_stages(lab.front, lab.scheduler, 2)
    addresses = sorted(worker.address for worker in status.workers)
    assert addresses == [f"{host.address}:50052" for host in lab.workers[:2]], describe(status)
    assert expected.strip()


def test_a_host_whose_cable_was_pulled_comes_back(lab: Lab, expected: str) -> None:
    host = lab.workers[1]
    host.set_cable(plugged_in=False)
    wait_until(lambda: lab.num_workers() == 1, 30.0, "the worker to be lost")
    accepted = lab.num_accepted()
    asking = lab.laptop.spawn("generate", *QUESTION, "--target", f"{lab.front.address}:50051")
    wait_until(lambda: lab.num_accepted() > accepted, 30.0, "the request to reach the scheduler")
    host.set_cable(plugged_in=True)
    answer, _ = asking.communicate(timeout=60.0)
    assert asking.returncode == 0, answer
    assert answer == expected


def test_a_third_host_takes_the_place_of_one_that_leaves(lab: Lab, expected: str) -> None:
    lab.start_worker(lab.workers[2])
    wait_until(lambda: lab.num_workers() == 3, 30.0, "the third worker to register")
    assert lab.workers[0].stop("worker") == 0
    assert lab.ask() == expected
    status = wait_for_stages(lab.front, lab.scheduler, 2)
    (pipeline,) = [p for p in status.pipelines if p.serving]
    by_id = {worker.worker_id: worker.address for worker in status.workers}
    used = {by_id[worker_id] for worker_id in pipeline.worker_ids}
    assert used == {f"{host.address}:50052" for host in lab.workers[1:]}
    lab.start_worker(lab.workers[0])


def test_a_killed_worker_that_is_started_again_serves_again(lab: Lab, expected: str) -> None:
    for host in lab.workers[1:]:
        host.stop("worker", signal.SIGKILL)
        lab.start_worker(host)
    assert lab.ask() == expected


def test_a_worker_with_another_model_is_refused_and_says_why(
    lab: Lab, expected: str, tmp_path: Path
) -> None:
    other = tmp_path / "demo"
    shutil.copytree(DEMO_MODEL, other)
    _flip_a_weight(other / "model.safetensors")
    command = ("worker", "--scheduler", lab.scheduler, "--model", str(other), "--listen")
    worker = lab.laptop.spawn(*command, f"{lab.laptop.address}:0")
    said, _ = worker.communicate(timeout=60.0)
    assert worker.returncode == 1
    assert "other weights" in said, said
    assert lab.ask() == expected


def _flip_a_weight(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_host_needs_only_the_files_of_its_own_layers(expected: str, tmp_path: Path) -> None:
    """Each worker's host has the shards with its layers; the last also the tied embedding."""
    halves = _split(tmp_path)
    with hosts(3, tmp_path) as (front, *workers):
        scheduler = f"{front.address}:50050"
        front.start("scheduler", "scheduler")
        front.start("gateway", "gateway", "--model", MODEL)
        for host, (layers, model) in zip(workers, halves, strict=True):
            command = ("worker", "--scheduler", scheduler, "--model", str(model))
            host.start("worker", *command, "--layers", layers)
        try:
            wait_for_stages(front, scheduler, 2)
            assert front.run("generate", *QUESTION, "--target", "127.0.0.1:50051") == expected
        finally:
            print(front.logs())


def _split(scratch: Path) -> list[tuple[str, Path]]:
    """(layers, directory) of each half of the demo model, both under the model's own name."""
    tensors = load_file(DEMO_MODEL / "model.safetensors")
    num_layers = json.loads((DEMO_MODEL / "config.json").read_text())["num_hidden_layers"]
    middle = num_layers // 2
    shards: dict[str, dict[str, torch.Tensor]] = {"ends": {}, "low": {}, "high": {}}
    for name, tensor in tensors.items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        shard = "ends" if layer is None else "low" if int(layer[1]) < middle else "high"
        shards[shard][name] = tensor
    index = {name: f"{shard}.safetensors" for shard, part in shards.items() for name in part}
    halves = []
    for shard, layers in (("low", f"0:{middle}"), ("high", f"{middle}:{num_layers}")):
        model = scratch / shard / DEMO_MODEL.name
        ignored = shutil.ignore_patterns("*.safetensors", ".*")
        shutil.copytree(DEMO_MODEL, model, ignore=ignored)
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        for name in ("ends", shard):
            save_file(shards[name], model / f"{name}.safetensors")
        halves.append((layers, model))
    return halves
