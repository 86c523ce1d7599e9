"""Logging of every process: structlog, for people on a terminal, JSON lines elsewhere.

The standard library's logging (uvicorn, grpc, asyncio) goes the same way. What is bound with
`request_context` is on every line that is logged within it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

LEVELS = ("debug", "info", "warning", "error")
# Libraries that say at `info` what only matters to somebody who debugs them.
_QUIET = ("asyncio", "httpx", "httpcore", "uvicorn.access", "uvicorn.error")


def configure_logging(role: str, *, json: bool | None = None, level: str = "info") -> None:
    """Send everything that this process logs at `level` or above to stderr, marked with `role`.

    `json` None: JSON lines unless stderr is a terminal.
    """
    as_json = not sys.stderr.isatty() if json is None else json
    shared = _shared_processors(role)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(as_json),
            ],
        )
    )
    _take_over_stdlib(handler, level)


@contextmanager
def request_context(request_id: str, **more: object) -> Iterator[None]:
    """Lines logged within, also in tasks begun within, carry the request's label."""
    with structlog.contextvars.bound_contextvars(request_id=request_id, **more):
        yield


def _shared_processors(role: str) -> list[Processor]:
    def add_role(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("role", role)
        return event

    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        add_role,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.stdlib.PositionalArgumentsFormatter(),
    ]


def _renderers(as_json: bool) -> list[Processor]:
    if as_json:
        return [
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(),
        ]
    return [
        _short_time,
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            timestamp_key="time",
            pad_event_to=0,
            exception_formatter=structlog.dev.plain_traceback,
        ),
    ]


def _short_time(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event["time"] = str(event["time"])[11:19]
    return event


def _take_over_stdlib(handler: logging.Handler, level: str) -> None:
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    # A reader of our stderr that went away is no reason to write there about it.
    logging.raiseExceptions = False
    logging.captureWarnings(True)
