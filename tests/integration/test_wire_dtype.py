"""Hidden states that travel in a narrower type than they are computed in, in a real mesh."""

from __future__ import annotations

from support.mesh import greedy_request, running_mesh
from support.paths import DEMO_MODEL
from support.waiting import wait_until

from protos import mesh_pb2

HIDDEN_SIZE = 256
# Of one decode step's frame beside its hidden states; a prompt's first one has more.
MAX_HEADER_BYTES = 300


def sent_by_the_first_stage(status: mesh_pb2.GetStatusResponse) -> tuple[int, int]:
    """(bytes, messages)"""
    (pipeline,) = status.pipelines
    (worker,) = (w for w in status.workers if w.worker_id == pipeline.worker_ids[0])
    return worker.stats.bytes_sent, worker.stats.messages_sent


def test_a_quarter_of_the_bytes_travels() -> None:
    with running_mesh(DEMO_MODEL, "--wire-dtype", "int8", stages=2) as mesh:
        output = mesh.generate(greedy_request([1, 2, 3], 100, ignore_eos=True))
        assert len(output.token_ids) == 100
        wait_until(
            lambda: sent_by_the_first_stage(mesh.status())[1] >= 100, 10.0, "heartbeats of all"
        )
        num_bytes, num_messages = sent_by_the_first_stage(mesh.status())
        assert num_bytes / num_messages < HIDDEN_SIZE + 4 + MAX_HEADER_BYTES < 4 * HIDDEN_SIZE
