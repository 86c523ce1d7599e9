"""The watchdog: what a step should take, and a device that does not come back from a job."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from support.paths import DEMO_MODEL

from stage_worker import awake_time
from stage_worker.device_thread import DeviceThread
from stage_worker.step_cost import StepCost
from stage_worker.watchdog import FIRST_STEP_LIMIT_S, step_limit_s, watch
from stagemesh.errors import StepTimeout
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import Epoch, Row, Span, Step


def new_cost() -> StepCost:
    return StepCost(ModelSpec.from_directory(DEMO_MODEL), Span(0, 3))


def step_of(*rows: tuple[int, int], first_stage: int = 0) -> Step:
    """Rows by where they start and how many tokens they have."""
    return Step(
        "p",
        Epoch(1, 1),
        0,
        tuple(
            Row(i, 0, start, num_tokens, (), (), first_stage, 2)
            for i, (start, num_tokens) in enumerate(rows)
        ),
    )


def test_work_counts_tokens_and_what_they_see() -> None:
    cost = new_cost()
    assert cost.work_of(step_of(), 0) == 1
    assert cost.work_of(step_of((0, 100)), 0) > 100
    assert cost.work_of(step_of((5000, 1)), 0) > 2 * cost.work_of(step_of((0, 1)), 0)
    assert cost.work_of(step_of((0, 100), first_stage=1), 0) == 1, "the row passes by"
    both = cost.work_of(step_of((0, 100), (7, 50)), 0)
    alone = cost.work_of(step_of((0, 100)), 0) + cost.work_of(step_of((7, 50)), 0)
    assert both == pytest.approx(alone)


def test_predictions_follow_measurements() -> None:
    cost = new_cost()
    assert cost.predict_s(5) == 0
    for _ in range(50):
        cost.observe(1, 0.010)
        cost.observe(1000, 0.5)
    assert cost.predict_s(1) == pytest.approx(0.010)
    assert cost.predict_s(900) == pytest.approx(0.5)
    assert cost.predict_s(4000) == pytest.approx(2.0), "in proportion, beyond what was seen"
    assert cost.predict_s(100) == pytest.approx(1.0), "in proportion to what is smaller"
    for _ in range(50):
        cost.observe(1, 0.020)
    assert cost.predict_s(1) == pytest.approx(0.020, rel=0.01)


def test_steps_larger_than_all_before_are_not_late() -> None:
    """Whatever a machine is, from decoding alone a large prefill is given time enough."""
    cost = new_cost()
    for _ in range(5):
        cost.observe(4, 0.040)
    assert step_limit_s(cost, 2048, 2.0) > 100


def test_limits() -> None:
    cost = new_cost()
    assert step_limit_s(cost, 1, 2.0) == FIRST_STEP_LIMIT_S
    for _ in range(3):
        cost.observe(1, 0.5)
    assert step_limit_s(cost, 1, 2.0) == pytest.approx(5.0)
    assert step_limit_s(cost, 1, 7.0) == 7.0


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awake_time, "LOOK_S", 0.02)


async def test_a_job_that_hangs_is_found() -> None:
    device, gate = DeviceThread(), threading.Event()
    watching = asyncio.create_task(watch(device))
    device.submit(lambda: gate.wait(60), name="step 7", limit_s=0.2)
    async with asyncio.timeout(30):
        error = await watching
    assert isinstance(error, StepTimeout)
    assert "step 7" in str(error)
    assert "0.2 s" in str(error)
    gate.set()
    assert await device.stop(10)


async def test_a_limit_is_that_of_what_is_known_while_the_job_runs() -> None:
    """Steps come in one after another: what the first of them took bounds those behind them."""
    device, gate = DeviceThread(), threading.Event()
    watching = asyncio.create_task(watch(device))
    limits_s = [60.0]
    device.submit(lambda: gate.wait(60), limit_s=lambda: limits_s[-1])
    done, _ = await asyncio.wait([watching], timeout=0.3)
    assert not done
    limits_s.append(0.2)
    async with asyncio.timeout(30):
        assert "0.2 s" in str(await watching)
    gate.set()
    assert await device.stop(10)


async def test_a_job_that_spins_is_found() -> None:
    device, gate = DeviceThread(), threading.Event()
    watching = asyncio.create_task(watch(device))

    def spin() -> None:
        while not gate.is_set():
            sum(range(1000))

    device.submit(spin, limit_s=0.2)
    async with asyncio.timeout(30):
        assert isinstance(await watching, StepTimeout)
    gate.set()
    assert await device.stop(10)


async def test_a_job_that_gets_little_of_the_processor_is_given_time() -> None:
    device = DeviceThread()
    watching = asyncio.create_task(watch(device))

    def starve() -> None:
        for _ in range(200):
            sum(range(50_000))  # a millisecond or so
            time.sleep(0.004)

    await device.run(starve, limit_s=0.7)
    assert not watching.done()
    watching.cancel()
    assert await device.stop(10)


async def test_neither_waiting_nor_jobs_without_a_limit_count() -> None:
    """A load takes as long as it takes, and what waits for it is not late."""
    device, gate = DeviceThread(), threading.Event()
    watching = asyncio.create_task(watch(device))
    loading = device.submit(lambda: gate.wait(60))
    steps = [device.submit(lambda: None, limit_s=0.1) for _ in range(20)]
    done, _ = await asyncio.wait([watching, *steps], timeout=0.5)
    assert not done
    gate.set()
    await asyncio.gather(loading, *steps)
    assert not watching.done()
    watching.cancel()
    assert await device.stop(10)


async def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    """A process that was frozen in the middle of a step and thaws goes on with it."""
    device, gate = DeviceThread(), threading.Event()
    watching = asyncio.create_task(watch(device))
    step = device.submit(lambda: gate.wait(60), limit_s=0.5)
    await asyncio.wait([watching], timeout=0.1)
    time.sleep(1.0)  # noqa: ASYNC251 - as a process that was stopped
    done, _ = await asyncio.wait([watching], timeout=0.1)
    assert not done
    gate.set()
    await step
    watching.cancel()
    assert await device.stop(10)
