"""A scripted scheduler as a process: `python paced_scheduler.py ADDRESS`.

Requests of an odd length wait for ever, others get a token now and then. The status counts what
runs and what was aborted.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

import grpc.aio  # noqa: E402
from support.scripted_scheduler import ScriptedScheduler, Submit, served  # noqa: E402

from protos import mesh_pb2  # noqa: E402

_PACE_S = 0.02


class PacedScheduler(ScriptedScheduler):
    async def _run(self, submit: Submit, events) -> None:  # type: ignore[no-untyped-def]
        if submit.max_tokens % 2:
            await asyncio.Event().wait()
        await super()._run(submit, events)

    async def _pass(self, index: int) -> None:
        await asyncio.sleep(_PACE_S)

    async def GetStatus(  # noqa: N802
        self,
        request: mesh_pb2.GetStatusRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> mesh_pb2.GetStatusResponse:
        queue = mesh_pb2.QueueStatus(num_accepted=len(self.submits), num_aborted=len(self.aborts))
        return mesh_pb2.GetStatusResponse(queue=queue, num_gateways=self.num_attached)


async def main(address: str) -> None:
    async with served(PacedScheduler(), address):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
