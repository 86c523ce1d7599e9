"""`stagemesh up` as its users meet it: the ready file, the commands against it, how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from support.mesh import Mesh, collect, greedy_request, running_mesh, started_up
from support.paths import DEMO_MODEL
from support.waiting import wait_gone, wait_until

from protos import text_generation_pb2 as pb
from protos import text_generation_pb2_grpc as pb_grpc

STAGEMESH = (sys.executable, "-m", "stagemesh.cli.main")
TIMEOUT_S = 120.0


def stagemesh(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*STAGEMESH, *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def free_ports(ready_file: Path) -> tuple[str, ...]:
    ports = ("--grpc-port", "0", "--http-port", "0", "--scheduler-port", "0")
    return ("--ready-file", str(ready_file), *ports)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with running_mesh(DEMO_MODEL, stages=2) as running:
        yield running


def test_the_ready_file_names_every_process(mesh: Mesh) -> None:
    processes = mesh.ready["processes"]
    assert sorted(p["role"] for p in processes) == ["gateway", "scheduler", "worker", "worker"]
    assert len({p["id"] for p in processes}) == len(processes)
    assert all(psutil.Process(p["pid"]).is_running() for p in processes)
    first, second = sorted(
        (p for p in processes if p["role"] == "worker"), key=lambda p: int(p["start_layer"])
    )
    assert first["start_layer"] == 0
    assert first["end_layer"] == second["start_layer"]
    assert (
        second["end_layer"]
        == json.loads((DEMO_MODEL / "config.json").read_text())["num_hidden_layers"]
    )
    for process in processes:
        host, port = process["address"].rsplit(":", 1)
        socket.create_connection((host, int(port)), timeout=5).close()


def test_generate_streams_to_the_terminal(mesh: Mesh) -> None:
    options = ("--max-tokens", "20", "--temperature", "0", "--target", mesh.ready["grpc"])
    done = stagemesh("generate", "Once upon a time", "--stats", *options)
    assert done.returncode == 0, done.stderr
    expected = mesh.generate(greedy_request("Once upon a time", 20)).text
    assert done.stdout == expected + "\n"
    assert "tokens in" in done.stderr


def test_generate_says_what_is_wrong_with_a_request(mesh: Mesh) -> None:
    done = stagemesh("generate", "Once", "--top-p", "0", "--target", mesh.ready["grpc"])
    assert done.returncode == 1
    assert done.stderr.startswith("stagemesh generate: ")
    assert "top_p" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_status_for_people_and_for_programs(mesh: Mesh) -> None:
    text = stagemesh("status", "--scheduler", mesh.ready["scheduler"], COLUMNS="200").stdout
    for process in mesh.ready["processes"]:
        if process["role"] == "worker":
            assert process["id"] in text
            assert f"{process['start_layer']}:{process['end_layer']}" in text
    status = json.loads(
        stagemesh("status", "--json", "--scheduler", mesh.ready["scheduler"]).stdout
    )
    assert status["mesh"]["serving"]
    assert {worker["state"] for worker in status["workers"]} == {"WORKER_STATE_SERVING"}


def test_a_talk_goes_on_after_ctrl_c_and_ends_with_the_input(mesh: Mesh) -> None:
    with subprocess.Popen(
        [*STAGEMESH, "chat", "--target", mesh.ready["grpc"], "--temperature", "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        output = _read_until(chat, b"> ")
        chat.stdin.write(b"Once upon a time\n")
        chat.stdin.flush()
        output += chat.stdout.read1()
        chat.send_signal(signal.SIGINT)
        output += _read_until(chat, b"> ")
        rest, _ = chat.communicate(b"Tom had a dog\n", timeout=TIMEOUT_S)
        assert chat.returncode == 0, output + rest
        assert b"Traceback" not in output + rest
        assert len(rest) > len("Tom had a dog")
    mesh.wait_idle()


def _read_until(process: subprocess.Popen[bytes], what: bytes) -> bytes:
    assert process.stdout is not None
    output = b""
    while not output.endswith(what):
        chunk = process.stdout.read1()
        assert chunk, output
        output += chunk
    return output


def test_health(mesh: Mesh) -> None:
    for process in mesh.ready["processes"]:
        done = stagemesh("health", process["address"])
        assert done.returncode == 0, f"{process['role']}: {done.stderr}"


@pytest.mark.parametrize(
    ("flag", "taken", "role"),
    [
        ("--grpc-port", "grpc", "gateway"),
        ("--http-port", "http", "gateway"),
        ("--scheduler-port", "scheduler", "scheduler"),
    ],
)
def test_a_port_in_use_is_one_sentence(
    mesh: Mesh, tmp_path: Path, flag: str, taken: str, role: str
) -> None:
    port = mesh.ready[taken].rsplit(":", 1)[1]
    done = stagemesh("up", *free_ports(tmp_path / "ready"), flag, port)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == f"stagemesh up: {role}: 127.0.0.1:{port} is in use by another process"


def test_ctrl_c_lets_requests_end_and_leaves_nothing() -> None:
    with (
        started_up("--stages", "1", "--drain-timeout", "60s") as up,
        grpc.insecure_channel(up.ready["grpc"]) as channel,
    ):
        ready, pids = up.ready, up.pids
        request = greedy_request("Once upon a time", 200, ignore_eos=True)
        stream = pb_grpc.TextGenerationStub(channel).Generate(request, timeout=TIMEOUT_S)
        first = next(stream)
        up.process.send_signal(signal.SIGINT)
        assert len(collect([first, *stream]).token_ids) == 200
        assert up.process.wait(30) == 0
        assert f"gRPC       {ready['grpc']}" in up.log.read_text()
        assert not up.ready_file.exists()
        wait_gone(pids)


def test_ctrl_c_ends_a_worker_that_does_not_answer() -> None:
    with started_up("--stages", "1") as up:
        pids = up.pids
        for process in up.ready["processes"]:
            if process["role"] == "worker":
                os.kill(process["pid"], signal.SIGSTOP)
        up.process.send_signal(signal.SIGTERM)
        assert up.process.wait(timeout=60) == 0
        wait_gone(pids)


def test_a_killed_up_takes_its_processes_with_it() -> None:
    with started_up("--stages", "1") as up:
        pids = up.pids
        up.process.kill()
        wait_gone(pids)


@pytest.mark.parametrize("role", ["scheduler", "gateway"])
def test_the_death_of_what_the_mesh_needs_ends_it(role: str) -> None:
    with started_up("--stages", "1") as up:
        pids = up.pids
        (process,) = (p for p in up.ready["processes"] if p["role"] == role)
        os.kill(process["pid"], signal.SIGKILL)
        assert up.process.wait(timeout=60) == 1
        told = f"stagemesh up: {role}: the process was ended by SIGKILL"
        assert told in up.log.read_text()
        wait_gone(pids)


def test_the_death_of_a_worker_is_reported_and_the_mesh_goes_on() -> None:
    with running_mesh(DEMO_MODEL, stages=2) as mesh:
        victim = mesh.pids("worker")[0]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: "is lost" in mesh.log.read_text(), 30.0, "a report")
        assert mesh.process.poll() is None
        wait_until(lambda: not mesh.status().mesh.serving, 30.0, "the scheduler to notice")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    done = stagemesh("up", "--model", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == (
        f"stagemesh up: --model {tmp_path}: no model there (a config.json is wanted)\n"
    )


def test_a_checkpoint_that_is_cut_off(tmp_path: Path) -> None:
    for file in DEMO_MODEL.iterdir():
        content = file.read_bytes()
        is_cut = file.suffix == ".safetensors"
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if is_cut else content)
    ready_file = tmp_path / "ready"
    done = stagemesh("up", *free_ports(ready_file), "--model", str(tmp_path))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("stagemesh up: worker-")
    assert "model.safetensors" in last
    assert not ready_file.exists()


@pytest.mark.parametrize("command", [("generate", "x"), ("status",), ("chat",)])
def test_nobody_there_is_one_sentence(command: tuple[str, ...]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        option = "--scheduler" if command[0] == "status" else "--target"
        done = stagemesh(*command, option, address)
    assert done.returncode == 1
    assert f"answers at {address}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_options_from_a_file_reach_the_services(tmp_path: Path) -> None:
    config = tmp_path / "mesh.toml"
    config.write_text('[up]\nstages = 1\n[gateway]\nserved_model_name = "storyteller"\n')
    with started_up("--config", str(config)) as up:
        assert [p["role"] for p in up.ready["processes"]].count("worker") == 1
        with grpc.insecure_channel(up.ready["grpc"]) as channel:
            stub = pb_grpc.TextGenerationStub(channel)
            model = stub.GetModel(pb.GetModelRequest(), timeout=30)
        assert model.model == "storyteller"
