"""What Prometheus gets from a scheduler, over real HTTP."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos import mesh_pb2
from scheduler.metrics import MeshMetrics
from scheduler.metrics_server import serving_metrics
from stagemesh.errors import AddressInUse, ConfigError

STATUS = mesh_pb2.GetStatusResponse(
    mesh=mesh_pb2.MeshState(serving=True),
    workers=[
        mesh_pb2.WorkerStatus(
            worker_id="w0",
            stats=mesh_pb2.WorkerStats(
                busy_ns=3 * 10**9,
                input_wait_ns=10**9,
                steps_executed=17,
                rss_anon_bytes=5,
                routing=[mesh_pb2.LayerRouting(layer=4, tokens=[9, 3])],
            ),
        )
    ],
    pipelines=[
        mesh_pb2.PipelineStatus(
            pipeline_id="p0", worker_ids=["w0", ""], unscheduled_ns=500_000_000, steps_done=17
        )
    ],
    queue=mesh_pb2.QueueStatus(num_waiting=2, generated_tokens=40),
)


async def ask(address: str, request: bytes) -> tuple[str, str]:
    """(head, body)"""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    writer.write_eof()
    text = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    head, _, body = text.partition("\r\n\r\n")
    return head, body


async def test_one_answer_has_the_whole_mesh() -> None:
    async with serving_metrics("127.0.0.1:0", MeshMetrics(lambda: STATUS).expose) as address:
        head, body = await ask(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert head.startswith("HTTP/1.1 200")
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }
    stage = ("pipeline", "p0"), ("stage", "0")
    for state, seconds in (("busy", 3), ("input_wait", 1), ("output_wait", 0), ("serialise", 0)):
        key = ("stagemesh_stage_seconds_total", *stage, ("state", state), ("worker", "w0"))
        assert samples[key] == seconds
    layer = ("layer", "4"), ("worker", "w0")
    for expert, tokens in enumerate((9, 3)):
        assert samples["stagemesh_expert_tokens_total", ("expert", str(expert)), *layer] == tokens
    assert samples["stagemesh_pipeline_unscheduled_seconds_total", ("pipeline", "p0")] == 0.5
    assert samples["stagemesh_worker_steps_total", ("worker", "w0")] == 17
    assert samples["stagemesh_worker_private_memory_bytes", ("worker", "w0")] == 5
    assert samples["stagemesh_scheduler_waiting_requests",] == 2
    assert samples["stagemesh_scheduler_generated_tokens_total",] == 40
    assert samples["stagemesh_mesh_serving",] == 1


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "404"),
        (b"GET /metrics?x=1 HTTP/1.1\r\n\r\n", "200"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"\x00\xff\r\n\r\n", "404"),
    ],
)
async def test_other_requests(request_bytes: bytes, status: str) -> None:
    async with serving_metrics("127.0.0.1:0", MeshMetrics(lambda: STATUS).expose) as address:
        assert (await ask(address, request_bytes))[0].split()[1] == status


async def test_a_head_without_end_gets_no_answer() -> None:
    async with serving_metrics("127.0.0.1:0", MeshMetrics(lambda: STATUS).expose) as address:
        assert await ask(address, b"x" * 20_000) == ("", "")
        assert (await ask(address, b"GET /metrics HTTP/1.1\r\n\r\n"))[0]


async def test_an_address_that_cannot_be_had() -> None:
    async with serving_metrics("127.0.0.1:0", bytes) as address:
        with pytest.raises(AddressInUse):
            async with serving_metrics(address, bytes):
                pass
    with pytest.raises(ConfigError):
        async with serving_metrics("no.such.host.invalid:1", bytes):
            pass
