"""A mesh of real processes, started with `stagemesh up` as a user would, and a client of it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from support.template import end_with_the_tests, shared_template, template_environ
from support.waiting import wait_until

from protos import mesh_pb2, mesh_pb2_grpc
from protos import text_generation_pb2 as pb
from protos import text_generation_pb2_grpc as pb_grpc
from stagemesh.cli.worker_template import PATH_VARIABLE

START_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 120.0


@dataclass
class Output:
    """All that one Generate call gave back."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[pb.TokenLogprobs] = field(default_factory=list)
    prompt: pb.PromptEcho | None = None
    summary: pb.GenerationSummary | None = None


def collect(responses: Iterable[pb.GenerateResponse]) -> Output:
    """Gathers a stream and checks its shape: deltas in order, then one summary, then the end."""
    output = Output()
    for response in responses:
        assert output.summary is None, "a message after the summary"
        if response.WhichOneof("event") == "summary":
            output.summary = response.summary
            continue
        delta = response.delta
        if delta.token_ids:
            assert delta.index == len(output.token_ids), "a delta out of order"
        if delta.HasField("prompt"):
            output.prompt = delta.prompt
        output.token_ids += delta.token_ids
        output.text += delta.text
        output.logprobs += delta.logprobs
    assert output.summary is not None, "the stream ended without a summary"
    assert output.summary.usage.completion_tokens == len(output.token_ids)
    return output


def greedy_request(
    prompt: str | Sequence[int], max_tokens: int, *, ignore_eos: bool = False, **fields: Any
) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        sampling=pb.SamplingParams(temperature=0.0),
        stopping=pb.StoppingCriteria(max_tokens=max_tokens, ignore_eos=ignore_eos),
        **fields,
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    return request


@dataclass
class Mesh:
    """A running mesh: its process, its addresses, and clients for them."""

    process: subprocess.Popen[bytes]
    ready: dict[str, Any]
    channel: grpc.Channel
    scheduler_channel: grpc.Channel
    log: Path
    # Says what `ready` does, with the processes of now where `up` starts them again.
    ready_file: Path

    @property
    def stub(self) -> pb_grpc.TextGenerationStub:
        return pb_grpc.TextGenerationStub(self.channel)

    @property
    def http_url(self) -> str:
        address = str(self.ready["http"])
        return address if address.startswith("http") else f"http://{address}"

    def pids(self, role: str) -> list[int]:
        return [p["pid"] for p in self.ready["processes"] if p["role"] == role]

    def start(self, request: pb.GenerateRequest) -> Any:
        """The call itself: an iterator of responses that can be cancelled."""
        return self.stub.Generate(request, timeout=CALL_TIMEOUT_S)

    def generate(self, request: pb.GenerateRequest) -> Output:
        return collect(self.start(request))

    def generate_all(self, requests: Iterable[pb.GenerateRequest]) -> list[Output]:
        """All at once: every call is started before the first is read."""
        calls = [self.start(request) for request in requests]
        return [collect(call) for call in calls]

    def status(self) -> mesh_pb2.GetStatusResponse:
        stub = mesh_pb2_grpc.SchedulerStub(self.scheduler_channel)
        response: mesh_pb2.GetStatusResponse = stub.GetStatus(
            mesh_pb2.GetStatusRequest(), timeout=10.0
        )
        return response

    def wait_idle(self, timeout_s: float = 20.0) -> mesh_pb2.GetStatusResponse:
        """Waits until the scheduler holds no request and every block is free again."""
        wait_until(lambda: is_idle(self.status()), timeout_s, "the mesh to be idle")
        return self.status()


def is_idle(status: mesh_pb2.GetStatusResponse) -> bool:
    return (
        status.queue.num_running == 0
        and status.queue.num_waiting == 0
        and all(p.num_free_blocks == p.num_blocks for p in status.pipelines)
        and all(p.steps_in_flight == 0 for p in status.pipelines)
    )


@dataclass(frozen=True)
class Up:
    """`stagemesh up` that serves, as a process."""

    process: subprocess.Popen[bytes]
    ready_file: Path
    log: Path

    @property
    def ready(self) -> dict[str, Any]:
        """What it says of itself now."""
        found: dict[str, Any] = json.loads(self.ready_file.read_text())
        return found

    @property
    def pids(self) -> list[int]:
        return [process["pid"] for process in self.ready["processes"]]


@contextlib.contextmanager
def started_up(*options: str, **environ: str) -> Iterator[Up]:
    """Starts `stagemesh up` on free ports, in a session of its own. Where it still runs in the end
    it is killed."""
    with tempfile.TemporaryDirectory() as scratch:
        ready_file, log = Path(scratch, "ready.json"), Path(scratch, "up.log")
        command = [
            *(sys.executable, "-m", "stagemesh.cli.main", "up", "--grpc-port", "0"),
            *("--http-port", "0", "--scheduler-port", "0", "--ready-file", str(ready_file)),
            *options,
        ]
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**template_environ(), **environ},
                start_new_session=True,
                preexec_fn=end_with_the_tests,
            )
        try:
            wait_until(
                lambda: ready_file.exists() or process.poll() is not None,
                START_TIMEOUT_S,
                "the mesh to serve",
            )
            assert process.poll() is None, log.read_text()
            yield Up(process, ready_file, log)
        finally:
            process.kill()
            process.wait()
            sys.stdout.write(log.read_text()[-4000:])


@contextlib.contextmanager
def running_mesh(model: Path, *options: str, stages: int = 2, replicas: int = 1) -> Iterator[Mesh]:
    """Starts `stagemesh up`, whose workers a template forks that tests share; ends it with Ctrl-C
    and checks that it ended well."""
    shape = ("--stages", str(stages), "--replicas", str(replicas))
    template = {PATH_VARIABLE: shared_template()}
    with started_up("--model", str(model), *shape, *options, **template) as up:
        with (
            grpc.insecure_channel(up.ready["grpc"]) as channel,
            grpc.insecure_channel(up.ready["scheduler"]) as scheduler_channel,
        ):
            yield Mesh(up.process, up.ready, channel, scheduler_channel, up.log, up.ready_file)
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(timeout=30.0) == 0, up.log.read_text()
