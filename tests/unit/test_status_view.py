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


MENDED = mesh_pb2.GetStatusResponse(
    workers=[
        mesh_pb2.WorkerStatus(worker_id="w0", state=mesh_pb2.WORKER_STATE_SERVING, draining=True),
        mesh_pb2.WorkerStatus(worker_id="w1", state=mesh_pb2.WORKER_STATE_SERVING),
        mesh_pb2.WorkerStatus(worker_id="w2", state=mesh_pb2.WORKER_STATE_READY),
        mesh_pb2.WorkerStatus(
            worker_id="w3", state=mesh_pb2.WORKER_STATE_IDLE, error="3 steps in a row failed"
        ),
    ],
    pipelines=[
        mesh_pb2.PipelineStatus(
            pipeline_id="p0",
            epoch=plan_pb2.Epoch(n=4),
            worker_ids=["w0", "w1"],
            serving=True,
            num_lacking_tokens=320,
            mending=mesh_pb2.MendingStatus(
                reason="worker w9 left", fill_ns=2_000_000, join_ns=31_000_000, num_blocks_moved=12
            ),
        )
    ],
)


def line_with(text: str, word: str) -> str:
    (line,) = (line for line in text.splitlines() if word in line)
    return line


def test_what_each_worker_is_there_for() -> None:
    text = shown(MENDED)
    rows = {line.split()[0]: line.split()[1] for line in text.splitlines() if line[:1] == "w"}
    assert rows["w0"] == "draining"
    assert rows["w1"] == "serving"
    assert rows["w2"] == "spare"
    assert "w3 is set aside: 3 steps in a row failed" in text


def test_a_pipeline_that_is_being_mended() -> None:
    line = line_with(shown(MENDED), "worker w9 left")
    assert line.startswith("mending")
    for fact in ("workers 2 ms", "joining 31 ms", "320 tokens lacking", "12 blocks moved"):
        assert fact in line
    assert "rebuilding" not in line
    assert "epoch 4" in shown(MENDED)


def test_a_pipeline_that_was_mended() -> None:
    whole = mesh_pb2.GetStatusResponse()
    whole.CopyFrom(MENDED)
    whole.pipelines[0].num_lacking_tokens = 0
    whole.pipelines[0].mending.rebuild_ns = 450_000_000
    whole.pipelines[0].mending.num_tokens_rebuilt = 320
    line = line_with(shown(whole), "worker w9 left")
    assert line.startswith("mended")
    assert "rebuilding 450 ms" in line
    assert "320 tokens rebuilt" in line


def test_a_place_that_nobody_holds() -> None:
    vacant = mesh_pb2.PipelineStatus(pipeline_id="p0", worker_ids=["w0", ""])
    text = shown(mesh_pb2.GetStatusResponse(pipelines=[vacant]))
    assert "waiting for workers" in text
    assert "(nobody)" in text


def test_a_worker_that_serves_two_pipelines_shows_both() -> None:
    shared = mesh_pb2.GetStatusResponse()
    shared.CopyFrom(STATUS)
    shared.pipelines.add(pipeline_id="p1", worker_ids=["worker-0", "worker-2"])
    rows = [line.split() for line in shown(shared).splitlines() if line.startswith("worker-")]
    assert [row[3:5] for row in rows if row[0] == "worker-0"] == [["p0", "p1"]]


def test_how_evenly_experts_are_busy() -> None:
    status = mesh_pb2.GetStatusResponse()
    status.CopyFrom(STATUS)
    assert "experts" not in shown(status)
    for layer, tokens in ((0, [5, 5, 5, 5]), (2, [0, 30, 10, 0])):
        status.workers[0].stats.routing.add(layer=layer, tokens=tokens)
    line = line_with(shown(status), "experts of worker-0")
    assert "2.0 times an even share on average" in line
    assert "3.0 times in layer 2 (expert 1)" in line


def test_a_mesh_with_nothing_in_it_can_be_shown() -> None:
    assert "not serving" in shown(mesh_pb2.GetStatusResponse())


def test_json_has_the_names_of_the_contract() -> None:
    content = json.loads(as_json(STATUS))
    assert content["workers"][0]["state"] == "WORKER_STATE_SERVING"
    assert content["queue"]["num_finished"] == "0"
