"""What a hop from stage to stage costs by the size of its hidden states, and how much of it shared
memory could save on one host.

Two processes: one pushes steps over a real stream, the other answers each with a result over
another one, as a last stage does. A hop is half of such a round. A hop without hidden states is
what remains at best if they went through shared memory, whose two copies are measured beside it.

    python -m benchmarks.hop
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import statistics
import time
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory

import uvloop

from stagemesh.plan import Epoch, Row, Step, StepResult
from stagemesh.rpc import RpcServer
from stagemesh.transport import (
    Hello,
    Message,
    PushStream,
    StepFrame,
    open_push_stream,
    push_handlers,
)

_EPOCH = Epoch(1, 1)
_HIDDEN = 1024
SIZES = (0, 4096, 65536, 2**20, 2**22)


class _Receiver:
    """A PushHandler that puts what comes into a queue."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()

    async def accept(self, hello: Hello) -> None: ...

    async def receive(self, hello: Hello, message: Message) -> None:
        self.messages.put_nowait(message)

    async def broken(self, hello: Hello, error: Exception | None) -> None: ...


async def _serve() -> tuple[RpcServer, _Receiver, str]:
    server, receiver = RpcServer("127.0.0.1:0"), _Receiver()
    server.server.add_generic_rpc_handlers((push_handlers(receiver),))
    return server, receiver, await server.start()


async def _stream(address: str) -> PushStream:
    return await open_push_stream(address, Hello("p", _EPOCH, 1, "x"), timeout_s=10)


def _answer(pipe: Connection) -> None:
    """The other process."""
    uvloop.install()
    asyncio.run(_answer_all(pipe))


async def _answer_all(pipe: Connection) -> None:
    server, receiver, address = await _serve()
    pipe.send(address)
    stream = await _stream(await asyncio.to_thread(pipe.recv))
    while True:
        message = await receiver.messages.get()
        assert isinstance(message, StepFrame)
        if not message.step.rows:
            break
        await stream.send(StepResult("p", _EPOCH, message.step.step, ()))
    await stream.close()
    await server.stop(0)


def _frame(size: int, number: int) -> StepFrame:
    rows = (Row(1, 0, 5, 1, (7,), (), 0, 2, (5,)),)
    num_tokens = size // (4 * _HIDDEN)
    payload = bytes(size)
    return StepFrame(
        Step("p", _EPOCH, number, rows), payload, "float32" if size else "", num_tokens, _HIDDEN
    )


async def measure(rounds: int) -> dict[int, list[float]]:
    """Microseconds of half a round trip, by size; the sizes in a mixed order."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_answer, args=(there,))
    process.start()
    server, receiver, address = await _serve()
    stream = await _stream(await asyncio.to_thread(here.recv))
    here.send(address)
    found: dict[int, list[float]] = {size: [] for size in SIZES}
    sizes = list(SIZES) * rounds
    random.Random(1).shuffle(sizes)  # a large one leaves work behind for whoever comes next
    for number, size in enumerate(sizes):
        frame = _frame(size, number)
        start_ns = time.perf_counter_ns()
        await stream.send(frame)
        await receiver.messages.get()
        found[size].append((time.perf_counter_ns() - start_ns) / 2e3)
    await stream.send(StepFrame(Step("p", _EPOCH, 0, ())))
    await asyncio.to_thread(process.join)
    await stream.abandon()
    await server.stop(0)
    return found


def shared_memory_us(size: int, rounds: int) -> float:
    """Median of two copies: into shared memory and out of it."""
    content, times = bytes(size), []
    memory = SharedMemory(create=True, size=max(1, size))
    shared = memory.buf
    assert shared is not None
    try:
        for _ in range(rounds):
            start_ns = time.perf_counter_ns()
            shared[:size] = content
            bytearray(shared[:size])
            times.append((time.perf_counter_ns() - start_ns) / 1e3)
    finally:
        shared.release()
        memory.close()
        memory.unlink()
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=400)
    args = parser.parse_args()
    uvloop.install()
    found = asyncio.run(measure(args.rounds))
    empty_us = statistics.median(found[0])
    print("| bytes | hop us | p99 | quickest | two copies us | shared memory saves at most us |")
    print("|" + "---|" * 6)
    for size, times in found.items():
        times.sort()
        median_us, copies_us = statistics.median(times), shared_memory_us(size, args.rounds)
        saved_us = max(0.0, 2 * (median_us - empty_us) - copies_us)
        cells = (median_us, times[int(0.99 * len(times))], times[0], copies_us, saved_us)
        print(f"| {size} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
