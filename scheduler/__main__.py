"""`python -m scheduler`: one scheduler process, with options from argv and the environment."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import uvloop

from scheduler.options import SchedulerOptions
from scheduler.server import serve
from stagemesh.process import run_service


def main(argv: Sequence[str] | None = None) -> int:
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    return run_service("scheduler", SchedulerOptions, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
