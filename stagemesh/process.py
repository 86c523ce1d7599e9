"""What every service process does around its `serve`: options, logs, signals, readiness, failure.

Knows no service: `python -m scheduler`, `gateway` and `stage_worker` hand theirs in.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog

from stagemesh.errors import ConfigError, InternalError, StageMeshError
from stagemesh.logs import LEVELS, configure_logging
from stagemesh.options import check_options, option, parse_groups
from stagemesh.supervision import Supervisor

T = TypeVar("T")
OnReady = Callable[[Mapping[str, object]], None]
Serve = Callable[[T, OnReady], Awaitable[None]]
OnTerminate = Callable[[], bool]

LOG_FORMATS = {"auto": None, "console": False, "json": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessOptions:
    """Options that every service has."""

    log_level: str = option("info", help="least severe level that is logged", choices=LEVELS)
    log_format: str = option(
        "auto", help="auto: console on a terminal, else json", choices=tuple(LOG_FORMATS)
    )
    ready_file: Path | None = option(
        None, help="file to write, whole, when the service is reachable: JSON with its address"
    )

    def __post_init__(self) -> None:
        check_options(self)


def run_service(
    role: str,
    options_class: type[T],
    serve: Serve[T],
    argv: Sequence[str] | None = None,
    *,
    on_terminate: OnTerminate | None = None,
) -> int:
    """Runs `serve(options, on_ready)` until it ends or SIGTERM or SIGINT cancels it.

    `on_terminate`, called in the event loop at the first SIGTERM, may return True: the service then
    ends by itself, in its own time, unless SIGINT or a second SIGTERM cancels it after all.

    `on_ready` takes facts for programs ({"address": "host:port", ...}) and may be called once the
    service is reachable. Returns the exit code: 0, 1 for a failure, 2 for a wrong option. An error
    that a user can cause is one line, to the supervisor where there is one, else to stderr.
    """
    supervisor = Supervisor.from_environment(os.environ)
    if supervisor is not None:
        supervisor.tie_lives()
    try:
        process, options = parse_groups(
            (ProcessOptions, options_class), argv, prog=f"stagemesh {role}"
        )
        configure_logging(role, json=LOG_FORMATS[process.log_format], level=process.log_level)
        on_ready = _announcer(process.ready_file, supervisor)
        asyncio.run(_until_signalled(serve, options, on_ready, on_terminate))
    except KeyboardInterrupt:
        return 0
    except BaseExceptionGroup as group:
        return _fail(role, root_cause(group), supervisor)
    except Exception as error:
        return _fail(role, error, supervisor)
    return 0


def write_whole(path: Path, content: str) -> None:
    """A reader of `path` sees all of `content` or no file."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(content, encoding="utf-8")
    draft.replace(path)


def _announcer(ready_file: Path | None, supervisor: Supervisor | None) -> OnReady:
    def on_ready(facts: Mapping[str, object]) -> None:
        if ready_file is not None:
            write_whole(ready_file, json.dumps({**facts, "pid": os.getpid()}) + "\n")
        if supervisor is not None:
            supervisor.report_ready(facts)

    return on_ready


async def _until_signalled(
    serve: Serve[T], options: T, on_ready: OnReady, on_terminate: OnTerminate | None
) -> None:
    service = asyncio.ensure_future(serve(options, on_ready))
    stopping = False
    may_ask = on_terminate

    def stop() -> None:
        nonlocal stopping
        stopping = True
        service.cancel()

    def terminate() -> None:
        nonlocal may_ask
        ask, may_ask = may_ask, None
        if ask is None or not ask():
            stop()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, terminate)
    loop.add_signal_handler(signal.SIGINT, stop)
    try:
        await service
    except asyncio.CancelledError:
        if not stopping:
            raise


def root_cause(error: BaseException) -> BaseException:
    """The error of a group that tells a user most: the first of ours, else the first."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [root_cause(each) for each in error.exceptions]
    return next((leaf for leaf in leaves if isinstance(leaf, StageMeshError)), leaves[0])


def _fail(role: str, error: BaseException, supervisor: Supervisor | None) -> int:
    known = isinstance(error, StageMeshError)
    if not known or isinstance(error, InternalError):
        log: Any = structlog.get_logger()
        log.error("the process failed", exc_info=error)
    code = error.code if isinstance(error, StageMeshError) else InternalError.code
    message = str(error) if known else f"{type(error).__name__}: {error}"
    if supervisor is not None:
        supervisor.report_failed(code, message)
    else:
        print(f"stagemesh {role}: {message}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1
