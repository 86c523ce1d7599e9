"""What survives the loss of workers, seen from outside: streams, and what was computed again."""

from __future__ import annotations

import pytest
from support.pretend_gateway import pretend_mesh
from support.pretend_streams import EVERYBODY, streams
from support.pretend_workers import until


@pytest.mark.parametrize("lost", ["w0", "w1", "w2"])
async def test_a_spare_takes_over_and_only_its_stage_is_rebuilt(lost: str) -> None:
    async with pretend_mesh(3) as mesh:
        spare = await mesh.worker("spare")
        gateway = await streams(mesh)
        before = {name: worker.num_tokens for name, worker in mesh.workers.items()}
        await mesh.workers.pop(lost).kill()
        await until(lambda: spare.num_tokens > 0, "the spare to compute")
        await gateway.wait_finished(*EVERYBODY)
        gateway.check(*EVERYBODY)
        status = await mesh.wait_idle()
        mending = status.pipelines[0].mending
        assert mending.fill_ns < 500e6, "from the loss to a whole pipeline"
        assert status.queue.num_preempted == 0
        assert 0 < mending.num_tokens_rebuilt <= spare.num_tokens
        others = [worker for name, worker in mesh.workers.items() if name != "spare"]
        for worker in others:
            num_new = worker.num_tokens - before[worker.worker_id]
            assert num_new < spare.num_tokens, "what it had is not computed again"


async def test_a_worker_that_is_killed_while_its_predecessor_is_replaced() -> None:
    async with pretend_mesh(3) as mesh:
        first, second = await mesh.worker("spare1"), await mesh.worker("spare2")
        gateway = await streams(mesh)
        first.gate.clear()
        second.gate.clear()
        await mesh.workers.pop("w1").kill()
        await until(lambda: bool(first.epochs or second.epochs), "a spare to join")
        await mesh.workers.pop("w2").kill()
        await until(lambda: bool(first.epochs and second.epochs), "the other to join")
        first.gate.set()
        second.gate.set()
        await gateway.wait_finished(*EVERYBODY)
        gateway.check(*EVERYBODY)
        assert (await mesh.wait_idle()).queue.num_preempted == 0
