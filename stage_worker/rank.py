"""`python -m stage_worker.rank`: the process of a rank of a worker that is not the first one. Where
the worker was forked from a template, so is its rank from it (`stage_worker.forked_rank`).

Before anything else it is tied to rank 0, whose child it is: it must never be left behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading

from stage_worker.rank_options import RankOptions
from stagemesh.supervision import end_with_parent


def run(options: RankOptions) -> int:
    """Until rank 0 is gone. Returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # for rank 0, which ends this one
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    if os.getppid() != options.parent_pid:
        return 0
    life = socket.socket(fileno=options.life_fd)
    threading.Thread(target=_end_when_over, args=(life,), name="life", daemon=True).start()

    from stage_worker.follower import Follower  # torch with it, which takes a while

    link, progress = socket.socket(fileno=options.link_fd), options.open_load_progress()
    Follower(link, options.open_group(), progress, options.open_fetch_reports()).run()
    return 0


def _end_when_over(life: socket.socket) -> None:
    """What the kernel's promise leaves out: other systems, and the moment before it was given."""
    with contextlib.suppress(OSError):
        life.recv(1)
    os._exit(0)


if __name__ == "__main__":
    # Not by way of Python's end, which a thread that reads experts cannot see.
    os._exit(run(RankOptions.from_argument(sys.argv[1])))
