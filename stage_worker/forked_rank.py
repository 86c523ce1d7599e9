"""A rank that begins as a copy of its worker, which a template forked: torch is there already.

A child of the worker's main thread like one that is executed, and its own process in all else: of
the worker's descriptors it has those that it is told of, and it never returns into its loop.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import subprocess
import sys
from collections.abc import Collection
from typing import NoReturn

from stage_worker.rank import run
from stage_worker.rank_options import RankOptions

_MAX_FDS = 1 << 20


class ForkedRank:
    """As much of a `subprocess.Popen` as is needed. To be made on the main thread, before this
    process has begun any work that threads of a library share in."""

    def __init__(self, options: RankOptions) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(options)
        self._pidfd = os.pidfd_open(self.pid)

    def kill(self) -> None:
        """Does nothing where it has ended and this is known."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        """Its exit code, or minus the signal that ended it. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            watched = select.poll()
            watched.register(self._pidfd, select.POLLIN)
            if not watched.poll(timeout * 1000):
                raise subprocess.TimeoutExpired("a rank", timeout)
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
            os.close(self._pidfd)
        return self.returncode


def _become(options: RankOptions) -> NoReturn:
    code = 1
    try:
        # What the worker has made is never looked at again, nor closed by whoever would collect it:
        # its descriptors have other meanings here.
        gc.freeze()
        signal.set_wakeup_fd(-1)
        _close_all_but({0, 1, 2, *options.fds})
        code = run(options)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _close_all_but(kept: Collection[int]) -> None:
    start = 0
    for fd in sorted(kept):
        if start < fd:  # os.closerange(0, 0) closes all there are
            os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, _MAX_FDS)
