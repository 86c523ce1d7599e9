"""A mesh that answers but does not compute: found by steps that do not come back."""

from __future__ import annotations

from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.pretend_gateway import PretendMesh, pretend_mesh
from support.pretend_streams import EVERYBODY, streams
from support.pretend_workers import until


async def is_healthy(mesh: PretendMesh) -> bool:
    health = health_pb2_grpc.HealthStub(mesh.channel)
    reply = await health.Check(health_pb2.HealthCheckRequest(service="mesh"))
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def test_an_idle_mesh_shows_that_it_serves() -> None:
    async with pretend_mesh(2, canary_interval_s=0.05) as mesh:
        await mesh.wait_status(lambda status: status.pipelines[0].steps_done >= 3, "canaries")
        status = await mesh.wait_idle()
        assert status.queue.num_accepted == status.queue.generated_tokens == 0
        assert status.pipelines[0].epoch.n == 1


async def test_an_idle_mesh_that_does_not_compute_is_not_healthy() -> None:
    async with pretend_mesh(2, canary_interval_s=0.05, lease_s=0.4) as mesh:
        await mesh.wait_status(lambda status: status.pipelines[0].steps_done >= 1, "a canary")
        assert await is_healthy(mesh)
        mesh.workers["w1"].gate.clear()
        mesh.workers["w1"].joins.clear()
        status = await mesh.wait_status(lambda status: not status.mesh.serving, "the watchdog")
        assert not await is_healthy(mesh)
        assert "did not come back" in status.mesh.detail
        mesh.workers["w1"].gate.set()
        mesh.workers["w1"].joins.set()
        await mesh.wait_serving()
        assert await is_healthy(mesh)


async def test_a_stage_that_hangs_in_mid_stream_loses_nothing() -> None:
    async with pretend_mesh(2, lease_s=0.4) as mesh:
        gateway = await streams(mesh)
        mesh.workers["w0"].gate.clear()
        await until(lambda: len(mesh.workers["w1"].epochs) > 1, "another epoch")
        mesh.workers["w0"].gate.set()
        await gateway.wait_finished(*EVERYBODY)
        gateway.check(*EVERYBODY)
        assert (await mesh.wait_idle()).queue.num_preempted == 0
