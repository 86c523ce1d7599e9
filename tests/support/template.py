"""Stage workers for tests, forked from one template: torch is imported once, and not in each of
hundreds of processes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from support.waiting import wait_until

from benchmarks.recovery.part import Process, execute
from stagemesh.fork_server import MAX_REPLY_BYTES, ForkRequest, ask, exit_code, parse_reply
from stagemesh.supervision import end_with_parent

START_TIMEOUT_S = 120.0


def template_environ(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`environ` as it is in workers that the shared template forks: what `up` would set by the
    number of stages is set for all of them."""
    not_ours = ("PYTEST_", "TORCHINDUCTOR_")  # pytest and torch set them while tests run
    own = {name: value for name, value in environ.items() if not name.startswith(not_ours)}
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    return {**own, **threads, "GRPC_VERBOSITY": "ERROR"}


@functools.cache
def shared_template() -> str:
    """Where a template listens that lives as long as these tests."""
    scratch = tempfile.mkdtemp(prefix="stagemesh-tests-")
    path = Path(scratch, "template")
    template = subprocess.Popen(
        [sys.executable, "-m", "stage_worker.template", str(path)],
        env=template_environ(),
        preexec_fn=end_with_the_tests,
    )

    def end() -> None:
        template.kill()
        template.wait()
        shutil.rmtree(scratch, ignore_errors=True)

    atexit.register(end)
    wait_until(
        lambda: path.exists() or template.poll() is not None, START_TIMEOUT_S, "the template"
    )
    return str(path)


def end_with_the_tests() -> None:
    """In the new process: a mesh does not outlive tests that are killed."""
    end_with_parent(signal.SIGTERM)


def fork_worker(
    command: Sequence[str], environ: Mapping[str, str], link: int, output: int
) -> Process:
    """A worker of the shared template; any other command is executed."""
    if tuple(command[:3]) != (sys.executable, "-m", "stage_worker"):
        return execute(command, environ, link, output)
    request = ForkRequest(list(command[3:]), template_environ(environ), os.getcwd())
    connection = ask(shared_template(), request, link, output)
    reply = parse_reply(connection.recv(MAX_REPLY_BYTES))
    assert "pid" in reply, reply
    return _ForkedProcess(reply["pid"], connection)


class _ForkedProcess:
    """A child of the template, which tells how it ends."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._connection = connection

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(BlockingIOError):
                self._take_end(socket.MSG_DONTWAIT)
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self._take_end()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _take_end(self, flags: int = 0) -> None:
        message = self._connection.recv(MAX_REPLY_BYTES, flags)
        self.returncode = exit_code(parse_reply(message))
        self._connection.close()
