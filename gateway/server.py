"""Wires a gateway together and runs it until it is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping

import structlog
import uvicorn

from gateway.grpc_front import SERVICE_NAME, TextGenerationServicer
from gateway.http.app import make_app
from gateway.http.common import HttpContext
from gateway.mesh_client import MeshClient, MeshClientSettings
from gateway.mesh_session import MeshView
from gateway.metrics import GatewayMetrics
from gateway.model import ServedModel
from gateway.options import GatewayOptions
from gateway.service import GenerationService
from protos import text_generation_pb2_grpc as pb_grpc
from stagemesh.addresses import join_address
from stagemesh.errors import AddressInUse, ConfigError, InternalError
from stagemesh.rpc import RpcServer

OnReady = Callable[[Mapping[str, object]], None]

_log = structlog.get_logger(__name__)
_GRPC_OVERHEAD_BYTES = 2**16


class _HttpServer(uvicorn.Server):
    """Signals are the process's business, not the server's. Calls `on_started` when it serves."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(options: GatewayOptions, on_ready: OnReady | None = None) -> None:
    """Serves both fronts; `on_ready` gets {"grpc": "host:port", "http": "host:port"}.

    When cancelled it takes no more requests, gives those that run `drain_timeout_s`, and returns by
    raising CancelledError. Raises CheckpointError, UnsupportedModel, AddressInUse, ConfigError.
    """
    model = await asyncio.to_thread(
        ServedModel.from_directory, options.model, options.served_model_name
    )
    rpc = RpcServer(
        join_address(options.host, options.grpc_port),
        max_message_bytes=options.max_body_bytes + _GRPC_OVERHEAD_BYTES,
        keepalive_s=options.client_keepalive_s,
    )

    def on_view(view: MeshView) -> None:
        rpc.set_serving(view.serving, SERVICE_NAME)
        service.names.learn(view)
        _log.info("the mesh serves" if view.serving else "the mesh does not serve", why=view.detail)

    mesh = MeshClient(_mesh_settings(options), on_view)
    service = GenerationService(
        model,
        mesh,
        GatewayMetrics(),
        max_concurrent_requests=options.max_concurrent_requests,
        default_timeout_s=options.default_timeout_s or None,
    )
    with contextlib.closing(service), _listen(options) as listener:
        rpc.add_service_name(SERVICE_NAME)
        servicer = TextGenerationServicer(service, options.slow_client_timeout_s)
        pb_grpc.add_TextGenerationServicer_to_server(servicer, rpc.server)  # type: ignore[no-untyped-call]
        grpc_address = await rpc.start()
        rpc.set_serving(mesh.view.serving, SERVICE_NAME)
        rpc.set_serving(True)
        facts = {"grpc": grpc_address, "http": _bound(listener)}

        def on_started() -> None:
            _log.info("listening", **facts)
            if on_ready is not None:
                on_ready(facts)

        http = _HttpServer(_http_config(options, service), on_started)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(mesh.run())
            await _run_fronts(rpc, http, listener, options.drain_timeout_s)
            raise InternalError("the HTTP server ended by itself")


async def _run_fronts(
    rpc: RpcServer, http: _HttpServer, listener: socket.socket, drain_timeout_s: float
) -> None:
    """Until cancelled; then both fronts drain while the link to the mesh is still up."""
    serving = asyncio.ensure_future(http.serve(sockets=[listener]))
    try:
        await asyncio.shield(serving)
    finally:
        http.should_exit = True
        await asyncio.gather(rpc.stop(drain_timeout_s), serving, return_exceptions=True)


def _mesh_settings(options: GatewayOptions) -> MeshClientSettings:
    return MeshClientSettings(
        scheduler_address=options.scheduler,
        gateway_id=options.gateway_id or f"{socket.gethostname()}-{os.getpid()}",
        max_unavailable_s=options.max_unavailable_s,
    )


def _http_config(options: GatewayOptions, service: GenerationService) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(HttpContext(service, options.max_body_bytes, options.slow_client_timeout_s)),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=max(1, round(options.drain_timeout_s)),
    )


def _listen(options: GatewayOptions) -> socket.socket:
    """Raises AddressInUse naming the address, ConfigError where it cannot be had at all."""
    host, port = options.host, options.http_port
    address = join_address(host, port)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _probe_clients(listener, options)
        listener.bind(where)
        listener.listen(1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"{address} is in use by another process") from error
        raise ConfigError(f"cannot listen on {address}: {error.strerror or error}") from error
    return listener


def _probe_clients(listener: socket.socket, options: GatewayOptions) -> None:
    """For each connection that is accepted: TCP itself would take a quarter of an hour to give up a
    client whose host is gone, and for ever where nothing is being sent."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        keepalive_s = math.ceil(options.client_keepalive_s)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, keepalive_s)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, math.ceil(keepalive_s / 2))
        # Also counts from what a client that is there has no room for.
        unread_ms = round(options.slow_client_timeout_s * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unread_ms)


def _bound(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return join_address(str(host), int(port))
