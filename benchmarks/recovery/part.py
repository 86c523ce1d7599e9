"""One process of a mesh: started, killed, frozen, started again under the same address.

As under a supervisor that never starts it by itself. Knows nothing of what the process does beyond
its command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from stagemesh.supervision import FD_VARIABLE

REPO = Path(__file__).resolve().parents[2]
READY_TIMEOUT_S = 60.0
POLL_S = 0.02
_MODULES = {"scheduler": "scheduler", "gateway": "gateway", "worker": "stage_worker"}


class Process(Protocol):
    """As much of a `subprocess.Popen` as a part needs."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...


# Of a command, its environment, its end of the link to its supervisor, and where its output goes.
Launch = Callable[[Sequence[str], Mapping[str, str], int, int], Process]


def execute(
    command: Sequence[str], environ: Mapping[str, str], link: int, output: int
) -> subprocess.Popen[bytes]:
    """Call it from the main thread: the process dies with the thread that started it."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env={**environ, FD_VARIABLE: str(link)},
        pass_fds=[link],
        start_new_session=True,
    )


@dataclass
class Part:
    """One process. `arguments` are used at each start; what `listening` gives for the facts that
    the first process reported is added from the second start on, so that the ports stay."""

    role: str
    name: str
    arguments: tuple[str, ...]
    scratch: Path
    listening: Callable[[Mapping[str, Any]], tuple[str, ...]]
    prefix: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    launch: Launch = execute
    process: Process | None = None
    _link: socket.socket | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def log(self) -> Path:
        return self.scratch / f"{self.name}.log"

    def start(self) -> None:
        """As `launch` wants it."""
        assert not self.alive, f"{self.name} runs already"
        self.kill()
        self._ready_file.unlink(missing_ok=True)
        listening = self.listening(self.facts) if self.facts else ()
        command = [
            *(*self.prefix, sys.executable, "-m", _MODULES[self.role]),
            *(*self.arguments, *listening, "--log-format", "json"),
            *("--ready-file", str(self._ready_file)),
        ]
        own = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GRPC_VERBOSITY": "ERROR"}
        environ = {**os.environ, **own, **self.environ}
        self._link, childs_link = socket.socketpair()
        with childs_link, self.log.open("ab") as sink:
            self.process = self.launch(command, environ, childs_link.fileno(), sink.fileno())

    async def wait_ready(self) -> None:
        await until(lambda: self._ready_file.exists() or not self.alive, f"{self.name} to be ready")
        assert self._ready_file.exists(), self.last_words()
        self.facts = json.loads(self._ready_file.read_text())

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: a worker hands its span over first."""
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, and gone when this returns; harmless to one that is gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        if self._link is not None:
            self._link.close()

    async def wait_ended(self, timeout_s: float = 30.0) -> int:
        """The exit code of a part that was told to end or will end by itself."""
        await until(lambda: not self.alive, f"{self.name} to end", timeout_s)
        assert self.process is not None
        return self.process.wait()

    def last_words(self) -> str:
        """The end of its log, and what it told its supervisor, for people."""
        said = b""
        if self._link is not None:
            with contextlib.suppress(OSError):
                said = self._link.recv(65536, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        return f"---- {self.name} ----\n{log[-3000:]}{said.decode(errors='replace')}"

    @property
    def _ready_file(self) -> Path:
        return self.scratch / f"{self.name}.ready"


async def until(
    condition: Callable[[], bool], what: str, timeout_s: float = READY_TIMEOUT_S
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        await asyncio.sleep(POLL_S)


def free_address() -> str:
    """For what must be known before the process that will listen there."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"
