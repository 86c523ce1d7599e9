"""The device thread: order, outcomes, limits and its end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from stage_worker import device_thread
from stage_worker.device_thread import DeviceThread
from stagemesh.errors import CheckpointError, InternalError, OutOfMemory, QueueFull


async def test_work_is_done_in_order_on_one_thread() -> None:
    device = DeviceThread()
    done: list[tuple[int, str]] = []
    futures = [
        device.submit(lambda n=n: done.append((n, threading.current_thread().name)))
        for n in range(100)
    ]
    await asyncio.gather(*futures)
    assert done == [(n, "device") for n in range(100)]
    assert await device.stop(5)


async def test_the_loop_goes_on_while_the_device_works() -> None:
    device = DeviceThread()
    gate = threading.Event()
    outcome = device.submit(lambda: gate.wait(20))
    waiting = device.submit(lambda: "next")
    assert device.num_unfinished > 0
    gate.set()
    assert (await outcome).unwrap() is True
    after = await waiting
    assert after.unwrap() == "next"
    assert after.queue_ns > 0
    assert after.idle_ns < after.queue_ns
    assert await device.stop(5)


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (CheckpointError("torn"), CheckpointError),
        (MemoryError("much"), OutOfMemory),
        (ZeroDivisionError("why"), InternalError),
    ],
)
async def test_errors_come_out_typed_and_the_thread_goes_on(
    raised: Exception, seen: type[Exception]
) -> None:
    device = DeviceThread()

    def fail() -> None:
        raise raised

    with pytest.raises(seen, match=str(raised)):
        await device.run(fail)
    assert await device.run(lambda: 7) == 7
    assert await device.stop(5)


async def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_thread, "MAX_QUEUED_JOBS", 3)
    device = DeviceThread()
    gate = threading.Event()

    def fill() -> None:
        for _ in range(5):
            device.submit(lambda: gate.wait(20))

    with pytest.raises(QueueFull):
        fill()
    gate.set()
    assert await device.stop(5)


async def test_stopping_drops_what_waits_and_tells_long_work() -> None:
    device = DeviceThread()
    done: list[str] = []

    started = asyncio.Event()
    loop = asyncio.get_running_loop()

    def long_work() -> None:
        loop.call_soon_threadsafe(started.set)
        while not device.stopping:
            pass
        done.append("long")

    long = device.submit(long_work)
    device.submit(lambda: done.append("dropped"))
    await started.wait()
    assert await device.stop(5)
    assert done == ["long"]
    await long
