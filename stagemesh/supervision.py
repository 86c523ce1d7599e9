"""The tie between a service process and the one that started it, seen from the service.

A supervisor hands its child one end of a socket. The child writes JSON lines on it ("ready",
"failed"), and takes the end of the stream for the supervisor's death, after which it may not live.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, MutableMapping

FD_VARIABLE = "STAGEMESH_SUPERVISOR_FD"
# A child that was orphaned and does not end by itself is ended after this.
ORPHAN_GRACE_S = 5.0
MAX_MESSAGE_CHARS = 4000
_PR_SET_PDEATHSIG = 1


class Supervisor:
    """The supervisor as its child sees it. `link` ends when it does."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> Supervisor | None:
        """The process that started this one, where it asked to be told; takes the variable away,
        so that this process's own children do not mistake the supervisor for theirs."""
        fd = environ.pop(FD_VARIABLE, None)
        if fd is None:
            return None
        link = socket.socket(fileno=int(fd))
        link.set_inheritable(False)
        return cls(link)

    def tie_lives(self) -> None:
        """This process ends when its supervisor does, in whatever way that ended."""
        end_with_parent()  # what happened before this line is noticed by the watcher
        threading.Thread(target=self._watch, name="supervisor-watch", daemon=True).start()

    def report_ready(self, facts: Mapping[str, object]) -> None:
        self._send({"ready": dict(facts)})

    def report_failed(self, code: str, message: str) -> None:
        self._send({"failed": {"code": code, "message": message[:MAX_MESSAGE_CHARS]}})

    def _send(self, message: Mapping[str, object]) -> None:
        with contextlib.suppress(OSError):  # gone: the watcher sees to that
            self.link.sendall(json.dumps(message).encode() + b"\n")

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            while self.link.recv(4096):
                pass
        # Not SIGTERM, after which a worker would look for a successor first.
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(ORPHAN_GRACE_S)
        os._exit(1)


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """The kernel's promise: this signal as soon as the thread that started this process has ended.
    SIGKILL is heeded even where it is stopped or holds the GIL. On Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
