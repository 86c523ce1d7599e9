"""`python -m stage_worker`: one stage worker process."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import threading
from collections.abc import Sequence

import uvloop

from stage_worker.leaving import Leaving
from stage_worker.options import WorkerOptions
from stagemesh.cores import num_cores
from stagemesh.process import OnReady, run_service

# Names of threads that torch runs on: of stage_worker.device_thread and stage_worker.expert_fetch.
_COMPUTING = ("device", "experts")


def main(argv: Sequence[str] | None = None) -> int:
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    leaving = Leaving()
    serve = functools.partial(_serve, leaving)
    code = run_service("worker", WorkerOptions, serve, argv, on_terminate=leaving.ask)
    if any(thread.name in _COMPUTING for thread in threading.enumerate()):
        # Arithmetic cannot be interrupted, and a thread inside of it cannot see Python end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


async def _serve(leaving: Leaving, options: WorkerOptions, on_ready: OnReady) -> None:
    _set_threads(options.threads, options.tensor_parallel)
    from stage_worker.server import serve as serve_worker  # imports torch: seconds

    await serve_worker(options, on_ready, leaving)


def _set_threads(num_threads: int, num_ranks: int) -> None:
    """OpenMP reads these once, when torch is imported: later, here and in other ranks, but where
    this process was forked from a template."""
    # Threads that wait must not spin on cores that another process could use.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if num_threads:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(num_threads)
    elif num_ranks > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_ranks)))


if __name__ == "__main__":
    sys.exit(main())
