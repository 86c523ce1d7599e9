"""Processes that begin with their imports done: forked by a template, which has made them.

The template listens on a Unix socket. A connection asks for one process and lasts as long as that:
the request with its two descriptors, then the answer, then the exit code. Knows no service; the
side that asks is `stagemesh.cli.worker_template`. On Linux only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import signal
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from stagemesh.supervision import FD_VARIABLE

MAX_REQUEST_BYTES = 1 << 18
MAX_REPLY_BYTES = 4096
# A client that has connected sends at once; whoever does not may not hold up the others.
_REQUEST_TIMEOUT_S = 5.0
# Read by a service when it starts. All others may have been read by a library as it was imported.
_FREE_PREFIX = "STAGEMESH_"
_was_forked = False


def was_forked() -> bool:
    """Whether this process began as a copy of a template."""
    return _was_forked


@dataclass(frozen=True, slots=True)
class ForkRequest:
    """Of one process. Beside it come the descriptors of its supervisor's link and of its output."""

    arguments: list[str]
    environ: dict[str, str]
    directory: str

    def encoded(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def ask(path: str, request: ForkRequest, link: int, output: int) -> socket.socket:
    """Asks the template at `path` for a process. Replies come by the connection that is returned:
    one with its "pid", if the template will, and another one at its end. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(path)
        socket.send_fds(connection, [request.encoded()], [link, output])
    except BaseException:
        connection.close()
        raise
    return connection


def parse_reply(message: bytes) -> Mapping[str, Any]:
    """Nothing where the template has ended."""
    found: Mapping[str, Any] = json.loads(message) if message else {}
    return found


def exit_code(last_reply: Mapping[str, Any]) -> int:
    """As of a subprocess. Where nothing came the template was killed, and the kernel then kills its
    children."""
    return int(last_reply.get("exit_code", -signal.SIGKILL))


def listen(path: str) -> socket.socket:
    """Requests keep their borders, and come with descriptors."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(64)
    return listener


class ForkServer:
    """The template, which must have one thread only. `lifeline`: it ends when this stream does."""

    def __init__(self, listener: socket.socket, lifeline: socket.socket | None) -> None:
        self._listener = listener
        self._lifeline = lifeline
        self._children: dict[int, tuple[int, socket.socket]] = {}  # by descriptor: pid, its client
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        if lifeline is not None:
            self._selector.register(lifeline, selectors.EVENT_READ)

    def run(self) -> list[str] | None:
        """Returns in every process that it forks, with that one's arguments; in the template with
        None, once the lifeline has ended."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._lifeline:
                    return None
                if key.fileobj is not self._listener:
                    self._reap(key.fd)
                elif (arguments := self._accept()) is not None:
                    return arguments

    def _accept(self) -> list[str] | None:
        connection, _ = self._listener.accept()
        with contextlib.ExitStack() as held:
            held.callback(connection.close)
            connection.settimeout(_REQUEST_TIMEOUT_S)
            try:
                message, fds, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 2)
                for fd in fds:
                    held.callback(os.close, fd)
                link, output = fds
                request = ForkRequest(**json.loads(message))
            except (OSError, ValueError, TypeError):
                return None  # no client of ours, or one that has gone
            if _has_gone(connection):
                return None  # tired of waiting; it has taken another way
            different = _differences(request.environ)
            if different:
                _tell(connection, {"refused": f"of another environment: {', '.join(different)}"})
                return None
            try:
                pid = os.fork()
            except OSError as error:
                _tell(connection, {"errno": error.errno})
                return None
            if pid == 0:
                self._close()
                _become(request, link, output)
                held.pop_all()
                connection.close()
                return request.arguments
            self._watch(pid, connection)
            held.pop_all()
            os.close(link)
            os.close(output)
        return None

    def _watch(self, pid: int, connection: socket.socket) -> None:
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = (pid, connection)
        self._selector.register(pidfd, selectors.EVENT_READ)
        _tell(connection, {"pid": pid})

    def _reap(self, pidfd: int) -> None:
        pid, connection = self._children.pop(pidfd)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        _tell(connection, {"exit_code": os.waitstatus_to_exitcode(status)})
        connection.close()

    def _close(self) -> None:
        """In a new process, which has no part in what the template is to others."""
        self._selector.close()
        self._listener.close()
        if self._lifeline is not None:
            self._lifeline.close()
        for pidfd, (_, connection) in self._children.items():
            os.close(pidfd)
            connection.close()


def _differences(environ: Mapping[str, str]) -> list[str]:
    """Names of variables that a library may have read here with another value, or none."""
    names = {*environ, *os.environ}
    return sorted(
        name
        for name in names
        if not name.startswith(_FREE_PREFIX) and environ.get(name) != os.environ.get(name)
    )


def _has_gone(connection: socket.socket) -> bool:
    watched = select.poll()
    watched.register(connection, 0)
    return bool(watched.poll(0))  # POLLHUP needs not be asked for


def _become(request: ForkRequest, link: int, output: int) -> None:
    """Makes a new process what it would be, had it been executed."""
    global _was_forked
    _was_forked = True
    os.setsid()
    os.chdir(request.directory)
    os.environ.clear()
    os.environ.update(request.environ)
    os.environ[FD_VARIABLE] = str(link)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(nothing)
    os.close(output)


def _tell(connection: socket.socket, message: Mapping[str, object]) -> None:
    with contextlib.suppress(OSError):  # gone: the process itself notices by its link
        connection.send(json.dumps(message).encode())
