"""`stagemesh health ADDRESS`: exit code 0 if the service there serves (container health checks)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from stagemesh.cli.client import RPC_TIMEOUT_S, connection
from stagemesh.errors import MeshUnavailable
from stagemesh.options import option, parse_options


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthOptions:
    address: str = option(help="host:port of the service", positional=True)
    service: str = option("", help="name of one of its gRPC services")


def run(argv: Sequence[str]) -> int:
    options = parse_options(HealthOptions, argv, prog="stagemesh health", environ={})
    status = asyncio.run(_check(options))
    if status != health_pb2.HealthCheckResponse.SERVING:
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
        raise MeshUnavailable(f"{options.address} answers, but is {name}")
    return 0


async def _check(options: HealthOptions) -> int:
    async with connection(options.address, "service") as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service=options.service), timeout=RPC_TIMEOUT_S
        )
    return int(reply.status)
