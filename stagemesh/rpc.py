"""The one place where gRPC channels and servers are made, and where errors cross them.

Whatever concerns every connection of the mesh (limits, keepalive, health, later TLS and tokens) is
decided here. Knows no service of the mesh. grpc.aio only.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar, cast

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from stagemesh import health
from stagemesh.addresses import join_address, split_address
from stagemesh.errors import (
    AddressInUse,
    ConfigError,
    InternalError,
    PeerLost,
    ProtocolError,
    RequestCancelled,
    RequestDeadlineExceeded,
    RequestTooLarge,
    StageMeshError,
    from_code,
    outward,
)

T = TypeVar("T")

MAX_FRAME_BYTES = 4 * 2**20
"""Payload of one frame of a data stream; larger payloads are continued in further frames."""

MAX_HEADER_BYTES = 24 * 2**20
"""Header of one frame: a step's rows with the prompts of the sequences that are new in it."""

MAX_MESSAGE_BYTES = MAX_HEADER_BYTES + MAX_FRAME_BYTES + 2**16
"""Any message that a channel or server takes; larger ones are refused with RESOURCE_EXHAUSTED."""

ERROR_KEY = "stagemesh-error"
RETRY_AFTER_KEY = "retry-after-ms"
_MAX_DETAIL_BYTES = 1800  # trailers are limited to 8 KiB, and each byte may take three there

KEEPALIVE_S = 10.0
"""A peer whose host is gone is noticed after 1.5 times this; one whose process died, at once."""


def _keepalive(every_s: float) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.keepalive_time_ms", round(every_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(every_s * 500)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )


_CHANNEL_OPTIONS = (
    *_keepalive(KEEPALIVE_S),
    # Connections of the mesh never go through the host's web proxy.
    ("grpc.enable_http_proxy", 0),
    # A connection of its own: no waiting behind another stream to the same peer, no inherited
    # backoff after somebody else's failure.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_retries", 0),
)

_SERVER_OPTIONS = (
    # A second server on the same port is a mistake, not a way to share load.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)


def make_channel(address: str, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> grpc.aio.Channel:
    """A channel to "host:port". Nothing is dialled before the first call."""
    split_address(address)
    options = (*_CHANNEL_OPTIONS, *_message_limits(max_message_bytes))
    return grpc.aio.insecure_channel(address, options=options)


def _message_limits(max_message_bytes: int) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
    )


class RpcServer:
    """A grpc.aio.Server with health and reflection. Must be made inside a running event loop.

    Add servicers to `server` and the names of those that have a descriptor by `add_service_name`,
    then `start`. Everything is "not serving" until `set_serving` says otherwise.
    """

    def __init__(
        self,
        address: str,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        keepalive_s: float = KEEPALIVE_S,
    ) -> None:
        split_address(address)
        self._address = address
        self._service_names: list[str] = []
        self._health = health.HealthService()
        self.server: grpc.aio.Server = grpc.aio.server(
            options=(
                *_keepalive(keepalive_s),
                *_SERVER_OPTIONS,
                *_message_limits(max_message_bytes),
            )
        )

    def add_service_name(self, name: str) -> None:
        """Lets reflection show the service, by its full name. Only before `start`."""
        self._service_names.append(name)

    async def start(self) -> str:
        """Binds and serves; returns the bound "host:port".

        Raises AddressInUse, naming the address, and ConfigError where it cannot be bound otherwise.
        """
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        names = [*self._service_names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self.server)
        try:
            port = self.server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise _bind_error(self._address) from error
        await self.server.start()
        return join_address(split_address(self._address)[0], port)

    def set_serving(self, serving: bool, service: str = "") -> None:
        self._health.set_serving(serving, service)

    async def stop(self, grace_s: float) -> None:
        """Stops taking calls, gives those that run `grace_s` seconds, then cancels them."""
        self._health.set_all_not_serving()
        await self.server.stop(grace_s)


def _bind_error(address: str) -> StageMeshError:
    """Why the address could not be bound: gRPC says only that it could not."""
    host, port = split_address(address)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return AddressInUse(f"{address} is in use by another process")
        return ConfigError(f"cannot listen on {address}: {error.strerror or error}")
    return AddressInUse(f"{address} could not be bound")


async def abort_with(
    context: grpc.aio.ServicerContext[Any, Any], error: StageMeshError
) -> NoReturn:
    """Ends the call with the status of `error`; its code travels in the trailing metadata."""
    metadata = [(ERROR_KEY, error.code)]
    if error.retry_after_s is not None:
        metadata.append((RETRY_AFTER_KEY, str(max(0, round(error.retry_after_s * 1000)))))
    status = grpc.StatusCode[outward(error).grpc]
    details = error.message.encode("utf-8", "replace")[:_MAX_DETAIL_BYTES].decode("utf-8", "ignore")
    await context.abort(status, details, tuple(metadata))
    raise AssertionError("context.abort() does not return")


def error_from_rpc(error: grpc.aio.AioRpcError) -> StageMeshError:
    """The error that a peer meant, or what the status alone tells of a peer that is not ours."""
    metadata = _text_items(error.trailing_metadata() or ())
    message = error.details() or error.code().name
    code = metadata.get(ERROR_KEY)
    if code is None:
        return _FROM_STATUS.get(error.code(), InternalError)(message)
    return from_code(code, message, retry_after_s=_retry_after_s(metadata.get(RETRY_AFTER_KEY)))


def peer_error(address: str, error: grpc.aio.AioRpcError) -> StageMeshError:
    """What a stream between parts of the mesh ended with: a named error, else PeerLost."""
    if ERROR_KEY in _text_items(error.trailing_metadata() or ()):
        return error_from_rpc(error)
    reason = error.details() or error.code().name
    return PeerLost(f"the stream to {address} broke: {reason}")


async def read_from(call: grpc.aio.StreamStreamCall[Any, T], address: str) -> T | None:
    """The next message of a stream that was dialled at `address`; None at its good end.

    Raises what the peer ended it with, or PeerLost.
    """
    try:
        message = await call.read()
    except grpc.aio.AioRpcError as error:
        raise peer_error(address, error) from None
    except asyncio.CancelledError:
        # gRPC raises it too where the peer cancelled, and nobody cancels this task.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise PeerLost(f"{address} cancelled the stream") from None
    return None if message is grpc.aio.EOF else cast(T, message)


def _text_items(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    return {key: value for key, value in metadata if isinstance(value, str)}


def _retry_after_s(milliseconds: str | None) -> float | None:
    if milliseconds is None or not re.fullmatch(r"[0-9]{1,12}", milliseconds):
        return None
    return int(milliseconds) / 1000


_FROM_STATUS: dict[grpc.StatusCode, type[StageMeshError]] = {
    grpc.StatusCode.UNAVAILABLE: PeerLost,
    grpc.StatusCode.CANCELLED: RequestCancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: RequestDeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RequestTooLarge,
    grpc.StatusCode.UNIMPLEMENTED: ProtocolError,
}
