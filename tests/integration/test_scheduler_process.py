"""The real scheduler over real gRPC, with workers that only right pages bring to right tokens."""

from __future__ import annotations

import contextlib

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.pretend_gateway import PretendGateway, pretend_mesh, prompt_of
from support.pretend_workers import MODEL, PARTS, Shape, until

from protos import mesh_pb2
from scheduler.options import SchedulerOptions
from scheduler.server import serve
from stagemesh.errors import AddressInUse, InternalError, ModelMismatch
from stagemesh.plan import Span
from stagemesh.rpc import make_channel


@pytest.mark.parametrize("num_workers", [1, 2, 4])
async def test_requests_get_the_right_tokens(num_workers: int) -> None:
    async with pretend_mesh(num_workers, max_chunk_tokens=5) as mesh:
        gateway = await mesh.gateway()
        numbers = range(12)
        for number in numbers:
            await gateway.submit(number, prompt_of(number, 1 + 3 * number), 10 + number)
        await gateway.wait_finished(*numbers)
        gateway.check(*numbers)
        status = await mesh.wait_idle()
        assert status.queue.num_finished == status.queue.num_accepted == 12
        assert status.queue.generated_tokens == sum(10 + number for number in numbers)
        assert [t.stage for t in status.pipelines[0].mean_timings] == list(range(num_workers))
        assert len(status.workers) == num_workers
        assert all(w.state == mesh_pb2.WORKER_STATE_SERVING for w in status.workers)


async def test_so_little_memory_that_requests_are_preempted() -> None:
    async with pretend_mesh(0, num_stages=2) as mesh:
        for index in range(2):
            await mesh.worker(f"w{index}", shape=Shape(num_blocks=20))
        await mesh.wait_serving()
        gateway = await mesh.gateway()
        for number in range(8):
            await gateway.submit(number, prompt_of(number, 10), 25)
        await gateway.wait_finished(*range(8))
        gateway.check(*range(8))
        assert (await mesh.wait_idle()).queue.num_preempted > 0


async def test_an_abort_frees_the_blocks_at_once() -> None:
    async with pretend_mesh() as mesh:
        gateway = await mesh.gateway()
        await gateway.submit(1, prompt_of(1, 8), 200)
        await until(lambda: len(gateway.tokens[1]) > 5, "some tokens")
        mesh.workers["w1"].gate.clear()
        await gateway.abort(1)
        await gateway.wait_finished(1)
        assert gateway.finished[1].reason == mesh_pb2.END_REASON_ABORTED
        await mesh.wait_idle()
        mesh.workers["w1"].gate.set()
        await gateway.submit(2, prompt_of(1, 8), 20)
        await gateway.wait_finished(2)
        gateway.check(2)


async def test_a_request_over_its_deadline_ends_with_that() -> None:
    async with pretend_mesh() as mesh:
        mesh.workers["w0"].gate.clear()
        gateway = await mesh.gateway()
        await gateway.submit(1, prompt_of(1, 8), 20, remaining_ns=50_000_000)
        await gateway.wait_finished(1)
        assert gateway.finished[1].error.code == "deadline_exceeded"


async def test_refusals_are_endings_with_a_code() -> None:
    async with pretend_mesh(max_waiting=1, max_running=1) as mesh:
        gateway = await mesh.gateway()
        mesh.workers["w0"].gate.clear()
        for number in range(4):
            await gateway.submit(number, prompt_of(number, 4), 5)
        await gateway.submit(10, (), 5)
        await gateway.submit(11, prompt_of(1, 300), 5)
        await gateway.submit(12, (1, 9999), 5)
        await gateway.wait_finished(3, 10, 11, 12)
        assert gateway.finished[3].error.code == "queue_full"
        assert gateway.finished[3].HasField("retry_after_ns")
        assert gateway.finished[10].error.code == "invalid_request"
        assert gateway.finished[11].error.code == "context_length_exceeded"
        assert "9999" in gateway.finished[12].error.message
        mesh.workers["w0"].gate.set()
        await gateway.wait_finished(0)
        gateway.check(0)


# ---- losses ------------------------------------------------------------------------------------


async def test_a_control_stream_that_breaks_costs_a_pause_and_no_recomputation() -> None:
    async with pretend_mesh() as mesh:
        gateway = await mesh.gateway()
        for number in range(6):
            await gateway.submit(number, prompt_of(number, 12), 150)
        await until(lambda: all(len(gateway.tokens[n]) > 3 for n in range(6)), "tokens of all")
        worker = mesh.workers["w1"]
        await worker.detach()
        worker.attach()
        await gateway.wait_finished(*range(6))
        gateway.check(*range(6))
        assert [join.keep_kv for join in worker.epochs] == [False, True]
        assert (await mesh.wait_idle()).queue.num_preempted == 0


@pytest.mark.parametrize("lost", ["w0", "w1"])
async def test_a_killed_worker_that_is_started_again_and_every_stream_goes_on(lost: str) -> None:
    async with pretend_mesh() as mesh:
        gateway = await mesh.gateway()
        for number in range(6):
            await gateway.submit(number, prompt_of(number, 12), 150)
        await until(lambda: all(len(gateway.tokens[n]) > 3 for n in range(6)), "tokens of all")
        await mesh.workers[lost].kill()
        await until(lambda: not gateway.mesh[-1].serving, "the mesh to notice")
        assert "waiting for" in gateway.mesh[-1].detail
        await mesh.worker(lost, incarnation=2)
        await gateway.wait_finished(*range(6))
        gateway.check(*range(6))
        await mesh.wait_idle()
        assert gateway.mesh[-1].serving


async def test_a_step_that_fails_is_tried_again() -> None:
    async with pretend_mesh() as mesh:
        gateway = await mesh.gateway()
        mesh.workers["w1"].fail_next_step = InternalError("a cosmic ray")
        await gateway.submit(1, prompt_of(1, 12), 20)
        await gateway.wait_finished(1)
        gateway.check(1)
        assert len(mesh.workers["w0"].epochs) == 2


async def test_a_request_that_no_stage_can_execute_ends_and_the_others_go_on() -> None:
    async with pretend_mesh() as mesh:
        gateway = await mesh.gateway()
        mesh.workers["w1"].fails_on_sequences_of = 13
        await gateway.submit(1, prompt_of(1, 13), 20)
        await gateway.wait_finished(1)
        assert gateway.finished[1].error.code == "internal"
        assert "cannot be executed" in gateway.finished[1].error.message
        await gateway.submit(2, prompt_of(2, 12), 20)
        await gateway.wait_finished(2)
        gateway.check(2)
        await mesh.wait_idle()


async def test_requests_wait_for_a_mesh_that_is_not_there_yet() -> None:
    async with pretend_mesh(0, num_stages=2) as mesh:
        gateway = await mesh.gateway()
        await gateway.submit(1, prompt_of(1, 12), 20)
        await mesh.worker("w0", shape=Shape(fixed=Span(0, 3)))
        await mesh.worker("w1", shape=Shape(fixed=Span(3, 4)))
        await gateway.wait_finished(1)
        gateway.check(1)
        status = await mesh.status()
        assert sorted((w.span.start, w.span.end) for w in status.workers) == [(0, 3), (3, 4)]


async def test_replicas_share_the_queue() -> None:
    async with pretend_mesh(0, num_stages=2, max_running=4) as mesh:
        for index in range(4):
            await mesh.worker(f"w{index}")
        await mesh.wait_serving(2)
        gateway = await mesh.gateway()
        for number in range(16):
            await gateway.submit(number, prompt_of(number, 12), 40)
        await gateway.wait_finished(*range(16))
        gateway.check(*range(16))
        assert all(worker.num_steps > 20 for worker in mesh.workers.values())


async def test_a_worker_with_another_model_is_told_why() -> None:
    async with pretend_mesh() as mesh:
        hashes = {part: part for part in PARTS} | {"layer.2": "other"}
        other = Shape(model=MODEL.__class__(**{**_fields(MODEL), "part_hashes": hashes}))
        stranger = await mesh.worker("stranger", shape=other)
        await until(lambda: stranger.refusal is not None, "the refusal")
        assert isinstance(stranger.refusal, ModelMismatch)
        assert "layer.2" in str(stranger.refusal)
        assert (await mesh.status()).mesh.serving


# ---- the process -------------------------------------------------------------------------------


async def test_health_tells_the_process_from_the_mesh() -> None:
    async with pretend_mesh(1) as mesh:
        health = health_pb2_grpc.HealthStub(mesh.channel)

        async def state(service: str) -> int:
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
            return int(reply.status)

        serving = health_pb2.HealthCheckResponse.SERVING
        assert await state("") == await state("stagemesh.v1.Scheduler") == serving
        assert await state("mesh") == serving
        await mesh.workers["w0"].kill()
        await mesh.wait_status(lambda status: not status.mesh.serving, "the loss")
        assert await state("") == serving
        assert await state("mesh") == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_port_in_use_is_named() -> None:
    async with pretend_mesh(0, num_stages=1) as mesh:
        with pytest.raises(AddressInUse, match=mesh.address):
            await serve(SchedulerOptions(listen=mesh.address), None)


async def test_gateways_are_told_when_the_scheduler_ends() -> None:
    async with contextlib.AsyncExitStack() as outliving:
        async with pretend_mesh() as mesh:
            # Not the mesh's own: a channel that closes ends its streams before they are read.
            channel = await outliving.enter_async_context(make_channel(mesh.address))
            gateway = await PretendGateway(channel).start()
        await until(lambda: gateway.status is not None, "the end of the stream")
        assert gateway.refusal is not None
        assert gateway.refusal.refused.code == "mesh_unavailable"
        await gateway.close()


async def test_a_bug_ends_the_process_instead_of_hanging(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    async def meet_the_bug() -> None:
        async with pretend_mesh() as mesh:
            gateway = await mesh.gateway()
            monkeypatch.setattr("scheduler.core.SchedulerCore.on_result", broken)
            await gateway.submit(1, prompt_of(1, 4), 4)
            await until(lambda: gateway.status is not None, "the end of the stream")

    with pytest.raises(ExceptionGroup) as caught:
        await meet_the_bug()
    assert caught.group_contains(ZeroDivisionError)


def _fields(model: object) -> dict[str, object]:
    return {name: getattr(model, name) for name in MODEL.__dataclass_fields__}


async def test_status_of_an_empty_mesh() -> None:
    async with pretend_mesh(0, num_stages=3) as mesh:
        status = await mesh.status()
        assert not status.mesh.serving
        assert status.mesh.detail == "no worker has registered"
        assert status.term > 0
