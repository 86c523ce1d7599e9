"""The dialling side of the data streams: pushes steps to the next process, results to the last.

One stream per hop and epoch, one connection per stream. What broke it is told to whoever sends or
waits. A peer is lost when it has neither answered a ping nor taken a frame for some time; gRPC's
own keepalive is slower and never the first to notice. What steps mean, and when to dial again, is
the business of others.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from dataclasses import dataclass
from typing import Any, Protocol

import grpc.aio
import structlog

from protos import plan_pb2
from stagemesh.errors import InternalError, PeerLost, ProtocolError, StageMeshError
from stagemesh.frames import (
    Hello,
    Message,
    decode_frame,
    encode_frame,
    encode_message,
    hello_header,
)
from stagemesh.rpc import make_channel, read_from
from stagemesh.silence import Silence
from stagemesh.wire import error_from_proto

SERVICE_NAME = "stagemesh.v1.StageTransport"
METHOD_NAME = "Push"

MAX_QUEUED_MESSAGES = 64
PING_INTERVAL_S = 0.5
PING_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 1.0

log = structlog.get_logger()


@dataclass(slots=True)
class Traffic:
    """What went over the streams that share this object: steps and results, not pings."""

    messages_sent: int = 0
    bytes_sent: int = 0
    messages_received: int = 0
    bytes_received: int = 0


class SendMeter(Protocol):
    """Whom a stream tells how far it is with a message, by calls that must not wait."""

    def writing(self) -> None:
        """A frame is offered to the connection."""

    def written(self) -> None:
        """It was taken."""

    def sent(self) -> None:
        """That was the message's last."""


class _NoMeter:
    def writing(self) -> None: ...
    def written(self) -> None: ...
    def sent(self) -> None: ...


async def open_push_stream(
    address: str,
    hello: Hello,
    *,
    timeout_s: float,
    traffic: Traffic | None = None,
    meter: SendMeter | None = None,
    ping_timeout_s: float = PING_TIMEOUT_S,
) -> PushStream:
    """A stream to `address`, once the peer has accepted it, which may take `timeout_s`.

    From then on it breaks when nothing is heard of the peer for `ping_timeout_s`. Raises what the
    peer refused with (StaleEpoch, ...), or PeerLost.
    """
    stream = PushStream(address, traffic or Traffic(), meter or _NoMeter(), ping_timeout_s)
    try:
        async with asyncio.timeout(timeout_s):
            await stream.introduce(hello)
    except TimeoutError:
        await stream.abandon()
        raise PeerLost(f"{address} did not accept the stream within {timeout_s:g} s") from None
    except BaseException:
        await stream.abandon()
        raise
    return stream


class PushStream:
    """The dialling side of a stream. Made by `open_push_stream`, ended by `close`.

    `rtt_ns` is the round trip of the latest ping, through the peer's event loop.
    """

    def __init__(
        self, address: str, traffic: Traffic, meter: SendMeter, ping_timeout_s: float
    ) -> None:
        self.address = address
        self.rtt_ns = 0
        self._silence = Silence(ping_timeout_s)
        self._traffic = traffic
        self._meter = meter
        self._channel = make_channel(address)
        self._call: grpc.aio.StreamStreamCall[Any, Any] = self._channel.stream_stream(
            f"/{SERVICE_NAME}/{METHOD_NAME}", None, None
        )()
        self._outbox: asyncio.Queue[Message | None] = asyncio.Queue(MAX_QUEUED_MESSAGES)
        # gRPC takes one write at a time; held per frame, so that a ping overtakes a long message.
        self._writing = asyncio.Lock()
        self._ponged = asyncio.Event()
        self._broken: asyncio.Future[StageMeshError] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    async def introduce(self, hello: Hello) -> None:
        """Returns when the peer has accepted: it takes frames in order, so its pong says so.

        Reads before it writes: a write that fails since the peer has refused already would keep
        gRPC from reading why.
        """
        accepted = asyncio.create_task(self._read_pong())
        try:
            await self._write(encode_frame(hello_header(hello)))
            await self._write(encode_frame(_ping_header(0)))
            await accepted
        finally:
            accepted.cancel()
        self._task = asyncio.create_task(self._run(), name=f"push stream to {self.address}")

    async def send(self, message: Message) -> None:
        """Queues a message, waiting while the queue is full. Raises what broke the stream."""
        if not self._broken.done():
            await self._outbox.put(message)
        if self._broken.done():
            raise self._broken.result()

    @property
    def is_full(self) -> bool:
        """Whether `send` would wait."""
        return self._outbox.full()

    @property
    def is_broken(self) -> bool:
        """Whether the stream has ended, by whomever."""
        return self._broken.done()

    async def wait_broken(self) -> StageMeshError:
        """Why the stream ended, once it has; PeerLost too where this side closed it."""
        return await asyncio.shield(self._broken)

    async def close(self) -> None:
        """Sends what is queued, tells the peer that this is all, and lets go of the connection."""
        if self._task is not None and not self._broken.done():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._outbox.put(None)
                    await asyncio.wait([self._task])
        await self.abandon()

    async def abandon(self) -> None:
        """Ends the stream at once."""
        self._break(PeerLost(f"the stream to {self.address} was closed by this side"))
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._call.cancel()
        await self._channel.close()

    async def _run(self) -> None:
        try:
            async with self._silence.limited(), asyncio.TaskGroup() as group:
                group.create_task(self._send_messages())
                group.create_task(self._take_pongs())
                group.create_task(self._ping())
        except* StageMeshError as errors:
            self._break(_first(errors))
        except* TimeoutError:
            silent = f"{self.address} was silent for {self._silence.limit_s:g} s"
            self._break(PeerLost(silent))
        except* Exception as errors:
            log.exception("a push stream failed", address=self.address)
            self._break(InternalError(f"the stream to {self.address} failed: {_first(errors)!r}"))
        finally:
            self._call.cancel()

    async def _send_messages(self) -> None:
        while (message := await self._outbox.get()) is not None:
            for frame in encode_message(message):
                self._meter.writing()
                await self._write(frame)
                self._meter.written()
                self._silence.heard()  # a frame that was taken says that the last one went
                self._traffic.bytes_sent += len(frame)
            self._traffic.messages_sent += 1
            self._meter.sent()
        await self._call.done_writing()

    async def _take_pongs(self) -> None:
        while True:
            await self._read_pong()
            self._silence.heard()
            self._ponged.set()

    async def _ping(self) -> None:
        interval_s = min(PING_INTERVAL_S, self._silence.limit_s / 4)
        for nonce in itertools.count(1):
            await asyncio.sleep(interval_s)
            self._ponged.clear()
            start_ns = time.perf_counter_ns()
            await self._write(encode_frame(_ping_header(nonce)))
            await self._ponged.wait()
            self.rtt_ns = time.perf_counter_ns() - start_ns

    async def _write(self, frame: bytes) -> None:
        """Does not say why a write failed: the reading side knows, since it hears a refusal."""
        async with self._writing:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await self._call.write(frame)

    async def _read_pong(self) -> int:
        """Raises what the peer refused with, or PeerLost."""
        frame = await read_from(self._call, self.address)
        if frame is None:
            raise PeerLost(f"{self.address} ended the stream")
        header, _ = decode_frame(frame)
        if header.WhichOneof("kind") == "refusal":
            raise error_from_proto(header.refusal.error)
        if header.WhichOneof("kind") != "pong":
            raise ProtocolError(f"{self.address} answered with something else than a pong")
        return int(header.pong.nonce)

    def _break(self, error: StageMeshError) -> None:
        if self._broken.done():
            return
        self._broken.set_result(error)
        while not self._outbox.empty():  # whoever waits for room goes on and sees the error
            self._outbox.get_nowait()


def _ping_header(nonce: int) -> plan_pb2.FrameHeader:
    return plan_pb2.FrameHeader(ping=plan_pb2.Ping(nonce=nonce))


def _first(errors: BaseExceptionGroup[Any]) -> Any:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
