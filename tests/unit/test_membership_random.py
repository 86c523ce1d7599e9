"""Anything may happen to workers, in any order: a mesh that has enough of them serves in the end.

The fake mesh checks all the while that nobody is believed to have KV that it has not.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from support.members import LIMITS, MS, FakeMesh, FakeWorker, S

from stagemesh.errors import InternalError, InvalidRequest, OutOfMemory, PeerLost

NAMES = "abcdef"
NUM_SEEDS = 75
NUM_EVENTS = 60


class Turmoil:
    """`drains` are numbers of drains that were begun."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        num_stages = self.random.choice([1, 2, 3])
        replicas = self.random.choice([0, 1])
        self.mesh = FakeMesh(replace(LIMITS, num_stages=num_stages, num_replicas=replicas))
        self.drains: set[int] = set()
        self._incarnations = iter(range(1, 10**6))
        self._away: dict[str, FakeWorker] = {}

    def step(self) -> None:
        losses = [self.kill, self.vanish, self.say_goodbye, self.drain, self.drain]
        troubles = [self.fail, self.blame, self.break_stream, self.change_mood]
        self.random.choice([self.come, self.come, self.come_back, *losses, *troubles])()
        self.mesh.run(deaf=self._away)
        self.pause()

    def pause(self) -> None:
        duration_ns = self.random.choice([0, 10 * MS, 300 * MS, 3 * S, 20 * S])
        self.mesh.wait(duration_ns, deaf=self._away)

    def heal(self) -> None:
        """Everybody is well, everybody is there."""
        self._away.clear()
        for worker in self.mesh.workers.values():
            worker.loads = worker.joins = worker.fetches = True
        for name in NAMES:
            self._start(name)
        self.mesh.run()
        self.mesh.wait(200 * S)

    # ---- what may happen -----------------------------------------------------------------------

    def come(self) -> None:
        self._start(self.random.choice(NAMES))

    def kill(self) -> None:
        if name := self._anybody():
            self.mesh.kill(name)

    def vanish(self) -> None:
        """The connection breaks, the process lives."""
        if name := self._anybody():
            self.mesh.disconnect(name)
            self._away[name] = self.mesh.workers[name]

    def come_back(self) -> None:
        for name in list(self._away):
            if self.mesh.workers.get(name) is self._away.pop(name):
                self.mesh.come_back(name)

    def drain(self) -> None:
        name, to = self._anybody(), self.random.choice(["", "", self._anybody()])
        if name:
            try:
                number = self.mesh.members.drain(
                    name, to, stay=self.random.random() < 0.5, now_ns=self.mesh.now_ns
                )
            except InvalidRequest:
                return
            self.drains.add(number)

    def say_goodbye(self) -> None:
        if name := self._anybody():
            session = self.mesh.workers.pop(name).session
            self.mesh.members.goodbye(session, "enough", self.mesh.now_ns)

    def fail(self) -> None:
        if name := self._anybody():
            error = self.random.choice([OutOfMemory("full"), InternalError("no idea")])
            self.mesh.members.failed(self.mesh.workers[name].session, error, self.mesh.now_ns)

    def blame(self) -> None:
        """A worker reports a neighbour, or itself."""
        name, other = self._anybody(), self._anybody()
        for pipeline in self.mesh.members.pipelines if name else ():
            session = self.mesh.workers[name].session
            address = self.mesh.workers[other].registration.address
            error = PeerLost("silent")
            self.mesh.members.epochs.broken(
                session, pipeline.pipeline_id, pipeline.epoch, error, address, self.mesh.now_ns
            )

    def break_stream(self) -> None:
        for pipeline in self.mesh.members.pipelines:
            if self.random.random() < 0.5:
                self.mesh.members.epochs.step_done(pipeline.pipeline_id)
                self.mesh.members.epochs.stream_broken(
                    pipeline.pipeline_id, pipeline.epoch, PeerLost("cut"), self.mesh.now_ns
                )

    def change_mood(self) -> None:
        if name := self._anybody():
            worker = self.mesh.workers[name]
            worker.joins = self.random.random() < 0.7
            worker.fetches = self.random.random() < 0.7

    # ---- inside --------------------------------------------------------------------------------

    def _anybody(self) -> str:
        here = [name for name in self.mesh.workers if name not in self._away]
        return self.random.choice(here) if here else ""

    def _start(self, name: str) -> None:
        """A process, in place of the one before."""
        self._away.pop(name, None)
        self.mesh.register(name, incarnation=next(self._incarnations))


@pytest.mark.parametrize("first_seed", range(0, NUM_SEEDS, 25))
def test_whatever_happens_the_mesh_serves_in_the_end(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 25):
        print(f"seed {seed}")
        turmoil = Turmoil(seed)
        for _ in range(NUM_EVENTS):
            turmoil.step()
        turmoil.heal()
        mesh = turmoil.mesh
        assert mesh.serving, "enough workers are there"
        assert not mesh.suspended
        assert set(mesh.drained) == turmoil.drains, "every drain ends"
        assert not any(worker.is_reserved for worker in mesh.members.workers)
        assert len(mesh.members.workers) == len(NAMES)
