"""Workers that are drained while streams run, over real gRPC: nothing is lost or computed again."""

from __future__ import annotations

from itertools import count

import grpc
import pytest
from support.pretend_gateway import PretendMesh, pretend_mesh
from support.pretend_streams import EVERYBODY, streams
from support.pretend_workers import until


async def test_a_drained_worker_hands_its_kv_over_and_leaves() -> None:
    async with pretend_mesh(3) as mesh:
        spare = await mesh.worker("spare")
        gateway = await streams(mesh)
        response = await mesh.drain("w1")
        assert response.successor_id == "spare"
        assert response.num_blocks_moved > 6 * 10
        await until(lambda: mesh.workers["w1"].was_released, "the worker to be told")
        await gateway.wait_finished(*EVERYBODY)
        gateway.check(*EVERYBODY)
        status = await mesh.wait_idle()
        assert status.pipelines[0].mending.num_tokens_rebuilt == 0
        assert status.pipelines[0].mending.num_blocks_moved == response.num_blocks_moved
        assert spare.num_tokens > 0
        assert sorted(worker.worker_id for worker in status.workers) == ["spare", "w0", "w2"]


async def test_a_stage_moves_to_a_named_worker_and_back() -> None:
    async with pretend_mesh(2) as mesh:
        await mesh.worker("other")
        gateway = await streams(mesh, max_tokens=200)
        assert (await mesh.drain("w0", "other", stay=True)).successor_id == "other"
        assert (await mesh.drain("other", "w0", stay=True)).successor_id == "w0"
        assert len(gateway.finished) == 0, "it was live"
        await gateway.wait_finished(*EVERYBODY)
        gateway.check(*EVERYBODY)
        assert (await mesh.wait_idle()).queue.num_preempted == 0


async def test_what_cannot_be_drained_is_said_with_its_kind() -> None:
    async with pretend_mesh(1) as mesh:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.drain("nobody")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "no worker nobody" in str(caught.value.details())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.drain("w0", stay=True)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert (await mesh.status()).mesh.serving


async def restart(mesh: PretendMesh, name: str, incarnation: int) -> None:
    """The process is told to stop, and started again when it has ended."""
    old = mesh.workers[name]
    old.drain()
    await until(lambda: old.was_released, f"{name} to be released")
    await old.kill()
    await mesh.worker(name, incarnation)
    await mesh.wait_serving()


@pytest.mark.parametrize("num_spares", [0, 1])
async def test_a_rolling_restart_of_all_workers(num_spares: int) -> None:
    incarnations = count(2)
    async with pretend_mesh(3) as mesh:
        for number in range(num_spares):
            await mesh.worker(f"spare{number}")
        gateway = await streams(mesh, max_tokens=200)
        for name in list(mesh.workers):
            await restart(mesh, name, next(incarnations))
        await gateway.wait_finished(*EVERYBODY)
        gateway.check(*EVERYBODY)
        status = await mesh.wait_idle()
        assert status.queue.num_preempted == 0
        assert len(status.workers) == 3 + num_spares
