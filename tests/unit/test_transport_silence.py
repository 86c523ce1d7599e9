"""Silence is counted while this side is awake to hear."""

from __future__ import annotations

import asyncio
import time

import pytest

from stagemesh.silence import Silence


async def test_silence_ends_what_waits() -> None:
    silence = Silence(0.2)
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        async with silence.limited():
            await asyncio.Event().wait()
    assert time.monotonic() - start > 0.15


async def test_signs_of_life_keep_it_going() -> None:
    silence = Silence(0.3)
    async with silence.limited():
        for _ in range(20):
            await asyncio.sleep(0.03)  # the interval of the signs, not a wait for anything
            silence.heard()


async def test_whoever_slept_himself_blames_nobody() -> None:
    silence = Silence(0.5)
    async with silence.limited():
        await asyncio.sleep(0)
        time.sleep(1.0)  # noqa: ASYNC251 - as a process that was stopped
        await asyncio.sleep(0.05)  # and now there is time to hear the peer


async def test_what_ends_in_time_is_left_alone() -> None:
    silence = Silence(0.05)
    async with silence.limited():
        pass
    await asyncio.sleep(0.1)
    assert asyncio.current_task() is not None
    assert not asyncio.current_task().cancelling()  # type: ignore[union-attr]
