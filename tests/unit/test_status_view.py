"""The tables of `stagemesh status`."""

from __future__ import annotations

import io
import json

from rich.console import Console

from protos import mesh_pb2, plan_pb2
from stagemesh.cli.status import as_json
from stagemesh.cli.status_view import render

STATUS = mesh_pb2.GetStatusResponse(
    term=3,
    mesh=mesh_pb2.MeshState(serving=True, model="demo", max_model_len=512),
    workers=[
        mesh_pb2.WorkerStatus(
            worker_id="worker-0",
            address="127.0.0.1:7001",
            state=mesh_pb2.WORKER_STATE_SERVING,
            span=mesh_pb2.LayerSpan(start=0, end=3),
            device="cpu",
            dtype=plan_pb2.DTYPE_FLOAT32,
            pid=41,
            stats=mesh_pb2.WorkerStats(compute_ns=3 * 10**9, idle_ns=10**9, steps_executed=17),
        ),
        mesh_pb2.WorkerStatus(
            worker_id="worker-1", state=mesh_pb2.WORKER_STATE_LOADING, load_fraction=0.25
        ),
    ],
    pipelines=[
        mesh_pb2.PipelineStatus(
            pipeline_id="p0",
            epoch=plan_pb2.Epoch(term=3, n=2),
            worker_ids=["worker-0", "worker-1"],
            serving=True,
            num_blocks=200,
            num_free_blocks=150,
            mean_timings=[plan_pb2.HopTiming(stage=0, compute_ns=1_234_000)],
        )
    ],
    queue=mesh_pb2.QueueStatus(num_running=5, num_waiting=2, generated_tokens_per_s=123.4),
)


def shown(status: mesh_pb2.GetStatusResponse) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(render(status))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_everything_that_matters_is_shown() -> None:
    text = shown(STATUS)
    for fact in (
        *("demo", "serving", "worker-0", "0:3", "cpu float32", "127.0.0.1:7001", "75"),
        *("loading 25%", "epoch 2", "KV 50/200 blocks", "1.23", "5 running", "2 waiting"),
        "123.4 generated",
    ):
        assert fact in text


def test_a_mesh_with_nothing_in_it_can_be_shown() -> None:
    assert "not serving" in shown(mesh_pb2.GetStatusResponse())


def test_json_has_the_names_of_the_contract() -> None:
    content = json.loads(as_json(STATUS))
    assert content["workers"][0]["state"] == "WORKER_STATE_SERVING"
    assert content["queue"]["num_finished"] == "0"
