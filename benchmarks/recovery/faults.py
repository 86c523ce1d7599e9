"""Faults at random: what may happen to a mesh of real processes, and how it is put right again.

Everything that is killed is started again after a while, as under a supervisor. Draws come from
one generator, whose seed says what happened.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc
import grpc.aio

from benchmarks.recovery.part import Part
from benchmarks.recovery.parts_mesh import PartsMesh
from protos import mesh_pb2, mesh_pb2_grpc

MAX_DOWN_S = 1.5
DRAIN_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done, for the record. `num_kills` counts processes that got SIGKILL."""

    kind: str
    victims: tuple[str, ...]
    num_kills: int


class Faults:
    """Does one thing at a time; `strike` returns when the dead have been started again.

    `keep` starts what ends by itself, as a supervisor would; that is counted in `num_ended`.
    """

    def __init__(self, mesh: PartsMesh, rng: random.Random, lease_s: float) -> None:
        self._mesh = mesh
        self.rng = rng
        self._lease_s = lease_s
        self._is_striking = False
        self.num_ended = 0
        self._kinds: dict[str, Callable[[], Awaitable[list[Part]]]] = {
            "kill a worker": self._kill_worker,
            "kill two workers": self._kill_two,
            "freeze and kill a worker": self._freeze_and_kill,
            "freeze and thaw a worker": self._freeze_and_thaw,
            "kill the scheduler": self._kill_scheduler,
            "drain a worker": self._drain,
        }

    @property
    def kinds(self) -> list[str]:
        return list(self._kinds)

    async def strike(self, kind: str) -> Fault:
        self._is_striking = True
        victims = await self._kinds[kind]()
        num_kills = len(victims) if "kill" in kind else 0
        await asyncio.sleep(self.rng.uniform(0.0, MAX_DOWN_S))
        for part in victims:
            if not part.alive:
                part.start()
        self._is_striking = False
        return Fault(kind, tuple(part.name for part in victims), num_kills)

    async def keep(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(0.5)
            dead = [part for part in self._mesh.parts if not part.alive]
            if not self._is_striking:
                self.num_ended += len(dead)
                for part in dead:
                    part.start()

    def _some_workers(self, num: int) -> list[Part]:
        alive = [part for part in self._mesh.workers.values() if part.alive]
        return self.rng.sample(alive, min(num, len(alive)))

    async def _kill_worker(self) -> list[Part]:
        victims = self._some_workers(1)
        for part in victims:
            part.kill()
        return victims

    async def _kill_two(self) -> list[Part]:
        victims = self._some_workers(2)
        for part in victims:
            part.kill()
            await asyncio.sleep(self.rng.choice((0.0, 0.1, 0.5)))
        return victims

    async def _freeze_and_kill(self) -> list[Part]:
        victims = self._some_workers(1)
        for part in victims:
            part.freeze()
            await asyncio.sleep(self.rng.uniform(0.0, 1.5 * self._lease_s))
            part.kill()
        return victims

    async def _freeze_and_thaw(self) -> list[Part]:
        victims = self._some_workers(1)
        for part in victims:
            part.freeze()
            await asyncio.sleep(self.rng.uniform(0.0, 1.5 * self._lease_s))
            part.thaw()
        return victims

    async def _kill_scheduler(self) -> list[Part]:
        self._mesh.scheduler.kill()
        return [self._mesh.scheduler]

    async def _drain(self) -> list[Part]:
        """By SIGTERM, or by the scheduler's verb where it knows the worker yet."""
        victims = self._some_workers(1)
        for part in victims:
            if self.rng.random() < 0.5 or not await self._drain_by_verb(part):
                part.terminate()
            await part.wait_ended(DRAIN_TIMEOUT_S)
        return victims

    async def _drain_by_verb(self, part: Part) -> bool:
        try:
            await drain(self._mesh, part.name)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                raise
            return False
        return True


async def drain(
    mesh: PartsMesh, worker: str, *, to: str = "", stay: bool = False
) -> mesh_pb2.DrainWorkerResponse:
    """The verb of `stagemesh drain`."""
    address = mesh.scheduler_at or mesh.scheduler.facts["address"]
    async with grpc.aio.insecure_channel(address) as channel:
        stub = mesh_pb2_grpc.SchedulerStub(channel)
        request = mesh_pb2.DrainWorkerRequest(worker_id=worker, to_worker_id=to, stay=stay)
        response: mesh_pb2.DrainWorkerResponse = await stub.DrainWorker(
            request, timeout=DRAIN_TIMEOUT_S, wait_for_ready=True
        )
        return response
