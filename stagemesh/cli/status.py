"""`stagemesh status`: workers, pipelines, queue and speed, once or live, for people or programs."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.json_format import MessageToJson
from rich.console import Console
from rich.live import Live

from protos import mesh_pb2
from stagemesh.cli.client import SCHEDULER, connection, get_status
from stagemesh.cli.status_view import render
from stagemesh.errors import ConfigError
from stagemesh.option_values import Kind
from stagemesh.options import check_options, option, parse_options

# What bars are of: shorter, and the workers' heartbeats would show in them.
_BARS_OF_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusOptions:
    scheduler: str = option(SCHEDULER, help="address of the scheduler")
    watch: bool = option(False, help="show it live until Ctrl-C")
    interval_s: float = option(
        1.0, help="time between two looks", kind=Kind.DURATION, minimum=0.05, maximum=3600
    )
    json: bool = option(False, help="print it as JSON, for programs")

    def __post_init__(self) -> None:
        check_options(self)
        if self.watch and self.json:
            raise ConfigError("--watch is for people and --json for programs: take one of them")


def run(argv: Sequence[str]) -> int:
    options = parse_options(
        StatusOptions,
        argv,
        prog="stagemesh status",
        description="Shows workers, pipelines, queue and speed of a mesh.",
    )
    if options.watch:
        asyncio.run(_watch(options))
        return 0
    status = asyncio.run(_once(options))
    if options.json:
        print(as_json(status))
    else:
        Console(highlight=False).print(render(status))
    return 0


def as_json(status: mesh_pb2.GetStatusResponse) -> str:
    """With the names of mesh.proto, fields at zero included."""
    text: str = MessageToJson(
        status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return text


async def _once(options: StatusOptions) -> mesh_pb2.GetStatusResponse:
    async with connection(options.scheduler, "scheduler") as channel:
        return await get_status(channel)


async def _watch(options: StatusOptions) -> None:
    console = Console(highlight=False)
    async with connection(options.scheduler, "scheduler") as channel:
        first = await get_status(channel)
        with Live(render(first), console=console, auto_refresh=False, screen=True) as live:
            seen = deque([(time.monotonic(), first)])
            while True:
                await asyncio.sleep(options.interval_s)
                seen.append((time.monotonic(), await get_status(channel)))
                while len(seen) > 2 and seen[1][0] <= seen[-1][0] - _BARS_OF_S:
                    seen.popleft()
                live.update(render(seen[-1][1], seen[0][1]), refresh=True)
