"""`stagemesh drain WORKER`: another worker goes on with its layers, and it ends or stays idle."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from protos import mesh_pb2, mesh_pb2_grpc
from stagemesh.cli.client import SCHEDULER, connection, get_status
from stagemesh.errors import RequestDeadlineExceeded
from stagemesh.option_values import Kind
from stagemesh.options import check_options, option, parse_options


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainOptions:
    worker: str = option(help="id of the worker, as status shows it", positional=True)
    to: str = option("", help="id of the worker that is to go on [whoever suits best]")
    stay: bool = option(False, help="the worker stays, as a spare without layers; else it ends")
    scheduler: str = option(SCHEDULER, help="address of the scheduler")
    timeout_s: float = option(
        600.0,
        help="how long to wait for it; the drain itself goes on",
        kind=Kind.DURATION,
        minimum=0.1,
    )

    def __post_init__(self) -> None:
        check_options(self)


def run(argv: Sequence[str]) -> int:
    """Raises what the scheduler has against it, and RequestDeadlineExceeded."""
    options = parse_options(
        DrainOptions,
        argv,
        prog="stagemesh drain",
        description="Hands a worker's layers and requests over to another one, and ends it.",
    )
    print(asyncio.run(drain(options)))
    return 0


async def drain(options: DrainOptions) -> str:
    """What became of it, for people. Raises as `run` does."""
    request = mesh_pb2.DrainWorkerRequest(
        worker_id=options.worker, to_worker_id=options.to, stay=options.stay
    )
    async with connection(options.scheduler, "scheduler") as channel:
        stub: Any = mesh_pb2_grpc.SchedulerStub(channel)  # type: ignore[no-untyped-call]
        # Whether anybody is there must be known soon; how long the drain takes, nobody can say.
        await get_status(channel)
        try:
            drained = await stub.DrainWorker(request, timeout=options.timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            raise RequestDeadlineExceeded(
                f"{options.worker} still has work after {options.timeout_s:g} s; its drain goes on "
                "(see stagemesh status)"
            ) from None
        lacking = "" if drained.successor_id else await _what_is_lacking(channel)
    return _outcome(options, drained) + lacking


def _outcome(options: DrainOptions, drained: mesh_pb2.DrainWorkerResponse) -> str:
    rest = "stays without layers" if options.stay else "has been told to end"
    if not drained.successor_id:
        return f"{options.worker} {rest}; nobody took its place"
    moved = drained.num_blocks_moved
    blocks = f", {moved} {'block' if moved == 1 else 'blocks'} of KV moved" if moved else ""
    return f"{options.worker} {rest}: {drained.successor_id} goes on with its layers{blocks}"


async def _what_is_lacking(channel: grpc.aio.Channel) -> str:
    mesh = (await get_status(channel)).mesh
    return "" if mesh.serving else f"\nthe mesh does not serve: {mesh.detail or 'it is incomplete'}"
