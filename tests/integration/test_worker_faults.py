"""What is wrong with a model, an option or an address ends a worker with a clear error."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import DEMO_MODEL, REPO
from support.stages import Live, Wish
from support.waiting import wait_until
from support.worker_links import (
    execute_alone,
    failure,
    link_scheduler,
    local_worker,
    push_to,
    worker_process,
)

from stage_worker.epoch_member import MAX_QUEUED_STEPS
from stage_worker.server import EXIT_HUNG
from stagemesh.errors import CheckpointError, ModelMismatch, QueueFull, SpanError
from stagemesh.frames import StepFrame
from stagemesh.plan import Epoch, Span, Step
from stagemesh.transport import PushStream

NUM_LAYERS = 6


async def test_a_worker_that_is_refused_for_good_ends_and_says_why() -> None:
    async with link_scheduler() as scheduler:
        scheduler.refusal = ModelMismatch("layer.3 differs from what the mesh serves")
        async with local_worker(DEMO_MODEL, scheduler.address) as worker:
            error = await failure(worker)
    assert isinstance(error, ModelMismatch)
    assert "layer.3 differs" in str(error)


async def test_a_port_in_use_is_named() -> None:
    async with (
        link_scheduler() as scheduler,
        worker_process(
            DEMO_MODEL, scheduler.address, "--listen", scheduler.address, launch=execute_alone
        ) as worker,
    ):
        assert await worker.wait() == 1
        assert f"{scheduler.address} is in use" in worker.output()


def truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)


def remove_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def change_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["MambaForCausalLM"]
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [(truncate, "model.safetensors"), (remove_weights, "files are missing")],
)
async def test_a_damaged_model_ends_the_worker(
    damage: Callable[[Path], None], complaint: str, tmp_path: Path
) -> None:
    model = demo_copy(tmp_path)
    damage(model)
    async with link_scheduler() as scheduler, local_worker(model, scheduler.address) as worker:
        error = await failure(worker)
    assert isinstance(error, CheckpointError)
    assert complaint in str(error)


async def test_a_model_damaged_after_the_worker_registered_is_reported(tmp_path: Path) -> None:
    model = demo_copy(tmp_path)
    async with link_scheduler() as scheduler, local_worker(model, scheduler.address) as worker:
        link = await scheduler.worker()
        truncate(model)
        link.start_load(0, NUM_LAYERS)
        assert (await link.expect("failed")).code == "checkpoint"
        assert isinstance(await failure(worker), CheckpointError)


async def test_weights_replaced_after_the_worker_registered_are_not_served(tmp_path: Path) -> None:
    """Whole, valid, of the same size: but not those whose hashes the mesh agreed on."""
    model = demo_copy(tmp_path)
    async with link_scheduler() as scheduler, local_worker(model, scheduler.address) as worker:
        link = await scheduler.worker()
        weights = model / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.with_suffix(".new").write_bytes(content)
        weights.with_suffix(".new").replace(weights)
        link.start_load(0, NUM_LAYERS)
        failed = await link.expect("failed")
        assert "have changed" in failed.message
        assert isinstance(await failure(worker), CheckpointError)


async def test_a_scheduler_whose_name_is_not_known_yet_is_waited_for() -> None:
    options = ("--listen", "0.0.0.0:0")
    async with worker_process(DEMO_MODEL, "no-such-host.invalid:50050", *options) as worker:
        told = "no way to no-such-host.invalid"
        await asyncio.to_thread(wait_until, lambda: told in worker.output(), 30.0, told)
        worker.signal(signal.SIGTERM)
        assert await worker.wait() == 0


async def test_more_steps_than_anybody_plans_end_the_epoch() -> None:
    """They would wait in memory for a device that is at work."""
    async with (
        link_scheduler() as scheduler,
        worker_process(DEMO_MODEL, scheduler.address),
    ):
        link = await scheduler.worker()
        await link.load(0, NUM_LAYERS)
        epoch = Epoch(1, 1)
        await scheduler.form([link], epoch)
        stream = await push_to(link, epoch)
        wish = Wish(prompt=[0] * 500, max_tokens=1)
        lives = [Live(i, wish, tuple(range(32)), wish.prompt) for i in range(600)]
        rows = tuple(live.row(1, None) for live in lives)
        await stream.send(StepFrame(Step("p", epoch, 0, rows)))
        with pytest.raises(QueueFull):
            await send_for_ever(stream, epoch)
        broken = await link.expect("epoch_broken")
        assert broken.error.code == "queue_full"
        assert (await link.next_stats()).steps_queued <= MAX_QUEUED_STEPS + 2
        await stream.abandon()


async def send_for_ever(stream: PushStream, epoch: Epoch) -> None:
    for number in itertools.count(1):
        await stream.send(StepFrame(Step("p", epoch, number, ())))


async def test_a_device_that_hangs_is_told_of_and_ends_the_process() -> None:
    """The neighbour learns it from the connection, the scheduler what it was."""
    hanging = (str(REPO / "tests/support/hanging_worker.py"),)
    flags = ("--worker-id", "1", "--step-timeout", "500ms")
    async with (
        link_scheduler() as scheduler,
        local_worker(DEMO_MODEL, scheduler.address, worker_id="0"),
        worker_process(
            DEMO_MODEL, scheduler.address, *flags, program=hanging, launch=execute_alone
        ) as worker,
    ):
        links = [await scheduler.worker() for _ in range(2)]
        links.sort(key=lambda link: link.registration.worker_id)
        for link, span in zip(links, [(0, 3), (3, NUM_LAYERS)], strict=True):
            await link.load(*span)
        epoch = Epoch(1, 1)
        await scheduler.form(links, epoch)
        stream = await push_to(links[0], epoch)
        for number in range(5):
            await stream.send(StepFrame(Step("p", epoch, number, ())))
        assert [(await scheduler.result()).step for _ in range(4)] == [0, 1, 2, 3]
        broken = await links[1].expect("epoch_broken")
        assert broken.error.code == "step_timeout"
        assert "step 4" in broken.error.message
        assert await worker.wait() == EXIT_HUNG
        assert "the device hangs" in worker.output()
        assert (await links[0].expect("epoch_broken")).peer_address == links[1].address
        await stream.abandon()


@pytest.mark.parametrize(
    ("flags", "complaint", "code"),
    [
        ((), "MambaForCausalLM", 1),
        (("--layers", "4:9"), "MambaForCausalLM", 1),
        (("--block-size", "0"), "--block-size", 2),
        (("--lairs", "0:1"), "--layers", 2),
    ],
    ids=["architecture", "both", "option", "unknown option"],
)
async def test_what_is_wrong_from_the_start_is_one_line_and_an_exit_code(
    flags: tuple[str, ...], complaint: str, code: int, tmp_path: Path
) -> None:
    model = demo_copy(tmp_path)
    change_architecture(model)
    async with worker_process(model, "127.0.0.1:1", *flags, launch=execute_alone) as worker:
        assert await worker.wait() == code
        assert complaint in worker.output()
        assert len(worker.output().splitlines()) == 1


def demo_copy(directory: Path) -> Path:
    copied = directory / "model"
    shutil.copytree(DEMO_MODEL, copied, ignore=shutil.ignore_patterns(".*"))
    return copied


async def test_a_fixed_span_outside_the_model_ends_the_worker() -> None:
    async with local_worker(DEMO_MODEL, "127.0.0.1:1", layers=Span(4, 9)) as worker:
        error = await failure(worker)
    assert isinstance(error, SpanError)
    assert "4:9" in str(error)


async def test_a_span_outside_the_model_is_reported_and_survived() -> None:
    async with link_scheduler() as scheduler, local_worker(DEMO_MODEL, scheduler.address):
        link = await scheduler.worker()
        link.start_load(3, 99)
        failed = await link.expect("failed")
        assert failed.code == "span"
        await link.load(3, NUM_LAYERS)
