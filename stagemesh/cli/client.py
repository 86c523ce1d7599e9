"""What the commands that talk to a running mesh have in common: stubs, and errors as sentences."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from protos import mesh_pb2, mesh_pb2_grpc, text_generation_pb2_grpc
from stagemesh.errors import PeerLost
from stagemesh.rpc import error_from_rpc, make_channel

RPC_TIMEOUT_S = 5.0
GATEWAY = "127.0.0.1:50051"
SCHEDULER = "127.0.0.1:50050"


@asynccontextmanager
async def connection(address: str, what: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel for the time of the block. What goes wrong on it is raised as one of our errors,
    which says `what` did not answer where nobody did."""
    async with make_channel(address) as channel:
        try:
            yield channel
        except grpc.aio.AioRpcError as error:
            raise _as_sentence(error, address, what) from None


def _as_sentence(error: grpc.aio.AioRpcError, address: str, what: str) -> Exception:
    ours = error_from_rpc(error)
    spoke = any(key == "stagemesh-error" for key, _ in error.trailing_metadata() or ())
    if spoke or error.code() not in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    ):
        return ours
    return PeerLost(f"no {what} answers at {address}: is the mesh running (stagemesh up)?")


async def get_status(channel: grpc.aio.Channel) -> mesh_pb2.GetStatusResponse:
    stub: Any = mesh_pb2_grpc.SchedulerStub(channel)  # type: ignore[no-untyped-call]
    response: mesh_pb2.GetStatusResponse = await stub.GetStatus(
        mesh_pb2.GetStatusRequest(), timeout=RPC_TIMEOUT_S
    )
    return response


def text_generation(channel: grpc.aio.Channel) -> Any:
    return text_generation_pb2_grpc.TextGenerationStub(channel)  # type: ignore[no-untyped-call]
