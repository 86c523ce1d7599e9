"""To wait for what another process will do."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import psutil


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)  # between two looks at a condition, never instead of one


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_gone(pids: Collection[int]) -> None:
    wait_until(lambda: not any(map(lives, pids)), 30.0, "every process to end")
