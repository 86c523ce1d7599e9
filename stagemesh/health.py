"""grpc.health.v1 for every server of the mesh: a table of services and who serves.

Differs from the servicer of grpcio-health-checking in one way: a status is set without awaiting, so
that it may change wherever the state behind it changes.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

SERVICE_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_Status = health_pb2.HealthCheckResponse


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Answers Check, List and Watch. A server that was never told anything is not serving."""

    def __init__(self) -> None:
        self._serving = {"": False}
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool, service: str) -> None:
        if self._serving.get(service) == serving:
            return
        self._serving[service] = serving
        self._wake_watchers()

    def set_all_not_serving(self) -> None:
        self._serving = dict.fromkeys(self._serving, False)
        self._wake_watchers()

    async def Check(  # noqa: N802 - the name of the rpc
        self, request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Any:
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return _Status(status=self._status(request.service))

    async def List(  # noqa: N802
        self, request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Any:
        statuses = {name: _Status(status=self._status(name)) for name in self._serving}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(  # noqa: N802
        self, request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        last = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != last:
                await context.write(_Status(status=status))
                last = status
            await changed.wait()

    def _status(self, service: str) -> int:
        serving = self._serving.get(service)
        if serving is None:
            return int(_Status.SERVICE_UNKNOWN)
        return int(_Status.SERVING if serving else _Status.NOT_SERVING)

    def _wake_watchers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
