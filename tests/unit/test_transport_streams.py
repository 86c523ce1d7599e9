"""The data streams over real connections: order, refusal, limits, and what either end learns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio
import pytest

from protos import plan_pb2
from stagemesh import push_stream
from stagemesh.errors import PeerLost, ProtocolError, StageMeshError, StaleEpoch, StepOutOfOrder
from stagemesh.frames import decode_frame, encode_frame, hello_header
from stagemesh.plan import Epoch, HopTiming, RowResult, SampledToken, Step, StepResult
from stagemesh.rpc import MAX_FRAME_BYTES, RpcServer, make_channel
from stagemesh.transport import (
    SERVICE_NAME,
    Hello,
    Message,
    PushStream,
    StepFrame,
    Traffic,
    open_push_stream,
    push_handlers,
)

HELLO = Hello(pipeline_id="p", epoch=Epoch(1, 2), to_stage=1, sender_id="w0")


@dataclass
class Recorder:
    """A handler that keeps what came, and fails where it is told to."""

    refusal: StageMeshError | None = None
    failure: Exception | None = None
    may_accept: asyncio.Event = field(default_factory=asyncio.Event)
    messages: list[Message] = field(default_factory=list)
    ended: asyncio.Queue[StageMeshError | None] = field(default_factory=asyncio.Queue)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.may_accept.set()

    async def accept(self, hello: Hello) -> None:
        assert hello == HELLO
        await self.may_accept.wait()
        if self.refusal is not None:
            raise self.refusal

    async def receive(self, hello: Hello, message: Message) -> None:
        if self.failure is not None:
            raise self.failure
        self.messages.append(message)
        self.arrived.set()

    async def broken(self, hello: Hello, error: StageMeshError | None) -> None:
        self.ended.put_nowait(error)

    async def wait_for(self, num_messages: int) -> None:
        while len(self.messages) < num_messages:
            self.arrived.clear()
            await self.arrived.wait()


@asynccontextmanager
async def serving(handler: Recorder, traffic: Traffic | None = None) -> AsyncIterator[str]:
    server = RpcServer("127.0.0.1:0")
    server.server.add_generic_rpc_handlers((push_handlers(handler, traffic),))
    address = await server.start()
    try:
        async with asyncio.timeout(30):
            yield address
    finally:
        await server.stop(0)


async def dial(address: str, traffic: Traffic | None = None) -> PushStream:
    return await open_push_stream(address, HELLO, timeout_s=10, traffic=traffic)


def step_frame(number: int, payload: bytes = b"") -> StepFrame:
    step = Step(pipeline_id="p", epoch=Epoch(1, 2), step=number, rows=())
    if not payload:
        return StepFrame(step=step)
    return StepFrame(
        step=step, payload=payload, dtype="float16", num_tokens=len(payload) // 2, hidden_size=1
    )


async def test_messages_arrive_in_order_and_are_counted() -> None:
    handler, sent, received = Recorder(), Traffic(), Traffic()
    async with serving(handler, received) as address:
        stream = await dial(address, sent)
        row = RowResult(7, 1, sampled=(SampledToken(4, 9),))
        result = StepResult("p", Epoch(1, 2), 200, (row,), (HopTiming(0, compute_ns=5),))
        for number in range(200):
            await stream.send(step_frame(number, b"ab"))
        await stream.send(result)
        await handler.wait_for(201)
        await stream.close()
        assert await handler.ended.get() is None
    steps = handler.messages[:-1]
    assert [frame.step.step for frame in steps if isinstance(frame, StepFrame)] == list(range(200))
    last = handler.messages[-1]
    assert isinstance(last, StepResult)
    assert last.rows == result.rows
    assert last.timings[0].compute_ns == 5
    assert last.timings[0].serialise_ns > 0
    assert sent.messages_sent == received.messages_received == 201
    assert sent.bytes_sent <= received.bytes_received  # pings are counted by neither as messages


async def test_a_payload_larger_than_a_frame_arrives_whole() -> None:
    handler = Recorder()
    payload = bytes(range(256)) * (MAX_FRAME_BYTES // 256 * 2) + b"xy"
    async with serving(handler) as address:
        stream = await dial(address)
        await stream.send(step_frame(0, payload))
        await stream.send(step_frame(1, b"ab"))
        await handler.wait_for(2)
        await stream.close()
    first, second = handler.messages
    assert isinstance(first, StepFrame)
    assert isinstance(second, StepFrame)
    assert bytes(first.payload) == payload
    assert first.receive_ns > 0
    assert bytes(second.payload) == b"ab"


async def test_pings_are_answered_while_long_messages_are_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(push_stream, "PING_INTERVAL_S", 0.001)
    handler = Recorder()
    async with serving(handler) as address:
        stream = await dial(address)
        for number in range(3):
            await stream.send(step_frame(number, bytes(3 * MAX_FRAME_BYTES)))
        await handler.wait_for(3)
        while not stream.rtt_ns:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await stream.close()


@pytest.mark.parametrize("error", [StaleEpoch("too old"), ProtocolError("who?")])
async def test_a_refused_stream_raises_what_the_peer_said(error: StageMeshError) -> None:
    async with serving(Recorder(refusal=error)) as address:
        with pytest.raises(type(error), match=str(error)):
            await dial(address)


async def test_opening_waits_until_the_peer_accepts() -> None:
    handler = Recorder()
    handler.may_accept.clear()
    async with serving(handler) as address:
        opening = asyncio.create_task(dial(address))
        done, _ = await asyncio.wait([opening], timeout=0.05)
        assert not done
        handler.may_accept.set()
        await (await opening).close()


async def test_opening_ends_with_its_timeout() -> None:
    handler = Recorder()
    handler.may_accept.clear()
    async with serving(handler) as address:
        with pytest.raises(PeerLost, match=r"did not accept .* within 0.05 s"):
            await open_push_stream(address, HELLO, timeout_s=0.05)


async def test_nobody_at_the_address_is_a_lost_peer() -> None:
    async with serving(Recorder()) as address:
        pass
    with pytest.raises(PeerLost, match=address):
        await dial(address)


@pytest.mark.parametrize(
    ("failure", "code"), [(StepOutOfOrder("a gap"), "step_out_of_order"), (KeyError(1), "internal")]
)
async def test_a_handler_that_fails_ends_the_stream_and_tells_the_sender(
    failure: Exception, code: str
) -> None:
    handler = Recorder(failure=failure)
    async with serving(handler) as address:
        stream = await dial(address)
        await stream.send(step_frame(0))
        error = await stream.wait_broken()
        assert error.code == code
        with pytest.raises(type(error)):
            await stream.send(step_frame(1))
        here = await handler.ended.get()
        assert here is not None
        assert here.code == code
        await stream.close()


async def test_the_sender_learns_at_once_that_the_peer_is_gone() -> None:
    handler = Recorder()
    server = RpcServer("127.0.0.1:0")
    server.server.add_generic_rpc_handlers((push_handlers(handler),))
    stream = await dial(await server.start())
    await server.stop(0)
    async with asyncio.timeout(5):
        assert isinstance(await stream.wait_broken(), PeerLost)
        assert isinstance(await handler.ended.get(), PeerLost)
    await stream.close()


async def test_a_sender_waiting_for_room_is_woken_when_the_stream_breaks() -> None:
    handler = Recorder()
    gate = asyncio.Event()

    async def stuck(hello: Hello, message: Message) -> None:
        await gate.wait()

    handler.receive = stuck  # type: ignore[method-assign]
    async with serving(handler) as address:
        stream = await dial(address)

        async def send_forever() -> None:
            for number in range(10**6):
                await stream.send(step_frame(number, bytes(MAX_FRAME_BYTES)))

        sending = asyncio.create_task(send_forever())
        while not stream.is_full:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await stream.abandon()
        with pytest.raises(PeerLost):
            await sending
        gate.set()


async def test_a_peer_that_does_not_answer_pings_is_lost() -> None:
    async def accept_and_stall(_: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await context.read()
        await context.read()
        await context.write(encode_frame(plan_pb2.FrameHeader(pong=plan_pb2.Ping())))
        while isinstance(await context.read(), bytes):
            pass

    method = grpc.stream_stream_rpc_method_handler(accept_and_stall)  # type: ignore[arg-type]
    server = RpcServer("127.0.0.1:0")
    server.server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE_NAME, {"Push": method}),)
    )
    address = await server.start()
    stream = await open_push_stream(address, HELLO, timeout_s=10, ping_timeout_s=0.2)
    async with asyncio.timeout(10):
        error = await stream.wait_broken()
    assert isinstance(error, PeerLost)
    assert "silent for 0.2 s" in str(error)
    await stream.abandon()
    await server.stop(0)


async def test_a_dialler_that_says_nothing_is_lost() -> None:
    handler = Recorder()
    server = RpcServer("127.0.0.1:0")
    handlers = push_handlers(handler, ping_timeout_s=lambda: 0.2)
    server.server.add_generic_rpc_handlers((handlers,))
    async with make_channel(await server.start()) as channel:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(
            f"/{SERVICE_NAME}/Push", None, None
        )()
        await call.write(encode_frame(hello_header(HELLO)))
        async with asyncio.timeout(10):
            error = await handler.ended.get()
            assert isinstance(error, PeerLost)
            assert "w0 was silent for 0.2 s" in str(error)
            refusal = decode_frame(await call.read())[0].refusal  # type: ignore[arg-type]
            assert refusal.error.code == "peer_lost"
    await server.stop(0)


async def test_streams_that_have_nothing_to_say_stay() -> None:
    """Pings alone are enough, for both sides."""
    handler = Recorder()
    server = RpcServer("127.0.0.1:0")
    handlers = push_handlers(handler, ping_timeout_s=lambda: 0.3)
    server.server.add_generic_rpc_handlers((handlers,))
    stream = await open_push_stream(await server.start(), HELLO, timeout_s=10, ping_timeout_s=0.3)
    seen: set[int] = set()
    async with asyncio.timeout(20):
        while len(seen) < 15:
            await asyncio.sleep(0.01)  # between two looks at what the pings measure
            seen.add(stream.rtt_ns)
            assert not stream.is_broken
    assert handler.ended.empty()
    await stream.close()
    await server.stop(0)


async def test_what_is_queued_is_sent_before_a_stream_closes() -> None:
    handler = Recorder()
    async with serving(handler) as address:
        stream = await dial(address)
        for number in range(20):
            await stream.send(step_frame(number, bytes(2**16)))
        await stream.close()
        assert await handler.ended.get() is None
        assert isinstance(await stream.wait_broken(), PeerLost)
    assert len(handler.messages) == 20


async def test_what_is_no_frame_is_refused_as_a_protocol_error() -> None:
    async with serving(Recorder()) as address, make_channel(address) as channel:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(
            f"/{SERVICE_NAME}/Push", None, None
        )()
        await call.write(b"\xff\xff\xff\xff junk")
        refusal = decode_frame(await call.read())[0].refusal  # type: ignore[arg-type]
        assert refusal.error.code == "protocol"
        assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
        metadata = dict(await call.trailing_metadata())
        assert metadata["stagemesh-error"] == "protocol"
