"""The one thread that touches torch: takes work in order, tells the event loop what came of it.

Does no I/O and knows nothing of steps and models. Everything about order in a worker rests on this
queue: what was submitted later runs later. Beside it experts are read ahead (`expert_fetch.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from stagemesh.errors import InternalError, OutOfMemory, QueueFull, StageMeshError

T = TypeVar("T")

MAX_QUEUED_JOBS = 1024


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What came of a job: a value or an error, and where its time went.

    `start_ns` is of time.perf_counter_ns; before it the device had nothing to do for `idle_ns`.
    """

    value: T | None
    error: Exception | None
    start_ns: int
    queue_ns: int
    run_ns: int
    idle_ns: int

    def unwrap(self) -> T:
        """The value. Raises the error: as it is where it is one of ours, else an InternalError."""
        if self.error is not None:
            raise as_mesh_error(self.error) from self.error
        return self.value  # type: ignore[return-value]


Limit = float | Callable[[], float] | None
"""How long a job may run, in seconds; a callable is asked while it runs, by the event loop."""


@dataclass(frozen=True, slots=True)
class Job:
    """Work for the device. Whether it takes longer than its limit is for others to watch."""

    work: Callable[[], Any]
    future: asyncio.Future[Outcome[Any]]
    submitted_ns: int
    name: str
    limit: Limit

    @property
    def limit_s(self) -> float | None:
        """As it is known by now."""
        return self.limit() if callable(self.limit) else self.limit


class DeviceThread:
    """Must be made inside the event loop that gets the outcomes."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._stopping = False
        self._running: Job | None = None
        self._thread.start()

    @property
    def num_unfinished(self) -> int:
        """Jobs that wait or are being done."""
        return self._jobs.qsize() + (self._running is not None)

    @property
    def running(self) -> Job | None:
        """What is being done now."""
        return self._running

    def cpu_s(self) -> float:
        """Processor time that the thread has used so far; 0 where the system does not say."""
        clock_of = getattr(time, "pthread_getcpuclockid", None)
        if clock_of is None or self._thread.ident is None or not self._thread.is_alive():
            return 0.0
        return time.clock_gettime(clock_of(self._thread.ident))

    @property
    def stopping(self) -> bool:
        """Long work asks this now and then, and gives up."""
        return self._stopping

    def submit(
        self, work: Callable[[], T], *, name: str = "a job", limit_s: Limit = None
    ) -> asyncio.Future[Outcome[T]]:
        """Queues `work`; the future never holds an exception. Raises QueueFull."""
        if self._jobs.qsize() >= MAX_QUEUED_JOBS:
            raise QueueFull(f"{MAX_QUEUED_JOBS} jobs wait for the device")
        future: asyncio.Future[Outcome[T]] = self._loop.create_future()
        self._jobs.put(Job(work, future, time.perf_counter_ns(), name, limit_s))
        return future

    async def run(self, work: Callable[[], T], *, name: str = "a job", limit_s: Limit = None) -> T:
        """Waits for `work` to be done in its turn. Raises StageMeshError."""
        return (await self.submit(work, name=name, limit_s=limit_s)).unwrap()

    async def stop(self, timeout_s: float) -> bool:
        """Lets the job that runs end, drops the others; whether the thread ended in time."""
        self._stopping = True
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        idle_since_ns = time.perf_counter_ns()
        while (job := self._jobs.get()) is not None and not self._stopping:
            self._running = job
            outcome = _run(job, idle_since_ns)
            self._running = None
            idle_since_ns = outcome.start_ns + outcome.run_ns
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(_resolve, job.future, outcome)
            del job, outcome  # or tensors would stay alive until the next job


def _run(job: Job, idle_since_ns: int) -> Outcome[Any]:
    value, error = None, None
    start_ns = time.perf_counter_ns()
    try:
        value = job.work()
    except Exception as raised:
        error = raised
    return Outcome(
        value=value,
        error=error,
        start_ns=start_ns,
        queue_ns=start_ns - job.submitted_ns,
        run_ns=time.perf_counter_ns() - start_ns,
        idle_ns=start_ns - idle_since_ns,
    )


def _resolve(future: asyncio.Future[Outcome[Any]], outcome: Outcome[Any]) -> None:
    if not future.done():
        future.set_result(outcome)


def as_mesh_error(error: Exception) -> StageMeshError:
    if isinstance(error, StageMeshError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return OutOfMemory(f"memory ran out: {error}")
    return InternalError(f"{type(error).__name__}: {error}")
