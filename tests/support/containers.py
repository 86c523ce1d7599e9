"""A Docker engine for tests: the compose project of this repository, under a name of its own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from support.paths import REPO
from support.waiting import wait_until

from protos import mesh_pb2, mesh_pb2_grpc
from protos import text_generation_pb2_grpc as pb_grpc

COMMAND_TIMEOUT_S = 60.0
# A minute on an idle machine of two cores, most of it for torch; a busy one takes several.
BUILD_TIMEOUT_S = 600.0
# The first test waits for the base image and for the images.
TEST_TIMEOUT_S = 2 * BUILD_TIMEOUT_S + 100.0
START_TIMEOUT_S = 90.0


def docker(*arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """What `docker ARGUMENTS` prints; fails the test with all of it where it fails."""
    return _output(["docker", *arguments], os.environ, timeout_s)


def require_engine() -> None:
    """Skips where no Docker engine answers; makes sure that the base image can be had."""
    if shutil.which("docker") is None:
        pytest.skip("needs a Docker engine: there is no docker command here")
    answer = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        pytest.skip(f"needs a Docker engine: none answers ({answer.stderr.strip()[-200:]})")
    compose_command()
    _output([str(REPO / "tests/compose/engine.sh"), "base"], os.environ, BUILD_TIMEOUT_S)


def compose_command() -> list[str]:
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) is None:
            continue
        if subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0:
            return command
    pytest.skip("needs docker compose: neither the plugin nor docker-compose is here")


def inspect(container_or_image: str) -> dict[str, Any]:
    (facts,) = json.loads(docker("inspect", container_or_image))
    return dict(facts)


def _output(command: list[str], environ: Mapping[str, str], timeout_s: float) -> str:
    done = subprocess.run(
        command,
        cwd=REPO,
        env=dict(environ),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@dataclass
class Project:
    """`docker compose` with the repository's compose.yaml; published ports are free ones."""

    variables: dict[str, str] = field(default_factory=dict)
    name: str = field(default_factory=lambda: f"stagemesh-test-{secrets.token_hex(4)}")

    def compose(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        ports = {"GRPC_PORT": "0", "HTTP_PORT": "0", "SCHEDULER_PORT": "0"}
        command = [*compose_command(), "-p", self.name, "-f", str(REPO / "compose.yaml")]
        return _output([*command, *arguments], {**os.environ, **ports, **self.variables}, timeout_s)

    def up(self) -> None:
        self.compose("up", "-d", "--no-build")

    def down(self) -> None:
        self.compose("down", "--volumes", "--timeout", "20")

    def containers(self, service: str) -> list[str]:
        """Ids of the service's containers, running or not."""
        return self._ids("ps", "-a", "-q", "--no-trunc", service=service)

    def leftovers(self) -> list[str]:
        """Ids of whatever the engine still has of this project."""
        kinds = (("ps", "-a", "-q"), ("network", "ls", "-q"), ("volume", "ls", "-q"))
        return [found for kind in kinds for found in self._ids(*kind)]

    def address(self, service: str, port: int) -> str:
        """Where this host publishes the port of a service."""
        (container,) = self.containers(service)
        (binding, *_) = inspect(container)["NetworkSettings"]["Ports"][f"{port}/tcp"]
        return f"127.0.0.1:{binding['HostPort']}"

    def network(self) -> str:
        (found,) = self._ids("network", "ls", "-q")
        return found

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "--tail", "60")

    def status(self) -> mesh_pb2.GetStatusResponse:
        with grpc.insecure_channel(self.address("scheduler", 50050)) as channel:
            stub = mesh_pb2_grpc.SchedulerStub(channel)
            response: mesh_pb2.GetStatusResponse = stub.GetStatus(
                mesh_pb2.GetStatusRequest(), timeout=5.0
            )
        return response

    def wait_serving(self, *, num_stages: int, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until a pipeline of this many stages serves."""

        def serves() -> bool:
            try:
                pipelines = self.status().pipelines
            except grpc.RpcError:
                return False
            return any(p.serving and len(p.worker_ids) == num_stages for p in pipelines)

        wait_until(serves, timeout_s, f"{num_stages} stages to serve")

    def wait_healthy(self, service: str, num: int) -> None:
        """Until the engine's own health checks of all containers of the service pass."""

        def healthy() -> bool:
            states = [inspect(each)["State"] for each in self.containers(service)]
            return [state["Health"]["Status"] for state in states] == ["healthy"] * num

        wait_until(healthy, START_TIMEOUT_S, f"{num} healthy containers of {service}")

    def wait_whole(self, *, num_stages: int, num_spares: int = 0) -> None:
        """Until so many stages serve and so many workers stand by."""

        def whole() -> bool:
            try:
                status = self.status()
            except grpc.RpcError:
                return False
            placed = sum(len(pipeline.worker_ids) for pipeline in status.pipelines)
            loading = mesh_pb2.WORKER_STATE_LOADING
            return (
                status.mesh.serving
                and placed == num_stages
                and len(status.workers) == num_stages + num_spares
                and not any(w.draining or w.state == loading for w in status.workers)
            )

        wait_until(whole, START_TIMEOUT_S, f"{num_stages} stages and {num_spares} spares")

    def worker(self, worker_id: str) -> str:
        """The container of a worker, which is named after its host."""
        hosts = {
            inspect(each)["Config"]["Hostname"]: each for each in self.containers("stage_worker")
        }
        return hosts[worker_id.partition(":")[0]]

    def stub(self, channel: grpc.Channel) -> pb_grpc.TextGenerationStub:
        return pb_grpc.TextGenerationStub(channel)

    def _ids(self, *listing: str, service: str | None = None) -> list[str]:
        filters = ["--filter", f"label=com.docker.compose.project={self.name}"]
        if service is not None:
            filters += ["--filter", f"label=com.docker.compose.service={service}"]
        return docker(*listing, *filters).split()


@contextlib.contextmanager
def running_project(variables: Mapping[str, str], *, num_stages: int) -> Iterator[Project]:
    """Up when it is entered, down without a trace when it is left.

    All are told to stop at the same time, and end by themselves before they would be killed.
    """
    project = Project(dict(variables))
    try:
        project.up()
        project.wait_serving(num_stages=num_stages)
        yield project
        project.compose("stop")
        print(project.logs())
        services = ("gateway", "stage_worker", "scheduler")
        ended = [inspect(each)["State"] for name in services for each in project.containers(name)]
        assert [state["ExitCode"] for state in ended] == [0] * len(ended)
    finally:
        project.down()
    assert project.leftovers() == []


def kill_hard(container: str) -> None:
    """SIGKILL from outside, as the kernel does when memory runs out.

    `docker kill` would count as the operator's wish, after which the restart policy does nothing.
    The signal is sent from a container that sees the host's processes, so that the tests need no
    other rights than those to use the engine.
    """
    pid = inspect(container)["State"]["Pid"]
    code = f"import os; os.kill({pid}, 9)"
    as_root = ("--rm", "--pid", "host", "--user", "0", "--entrypoint", "python3")
    docker("run", *as_root, "stagemesh-control", "-c", code)


def wait_restarted(container: str, earlier_pid: int, timeout_s: float = 30.0) -> None:
    def restarted() -> bool:
        state = inspect(container)["State"]
        return bool(state["Running"]) and state["Pid"] not in (0, earlier_pid)

    wait_until(restarted, timeout_s, "the container to be started again")
