"""Workers that leave in good order: each place is handed over, with its KV, before its worker goes.

One place after the other, where it serves two pipelines. A successor that has yet to load does so
while the worker serves on. If the successor fails, the worker, which still has the KV, takes its
place again and another is sought. Where there is none the worker is released at once, and its stage
rebuilt on whoever comes. Sans-IO, a part of membership.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import structlog

from scheduler.formation import Formation
from scheduler.messages import DrainDone, Effect
from scheduler.pipelines import MeshPipeline
from scheduler.places import best_free
from scheduler.roster import Roster
from scheduler.sharing import make_room
from scheduler.workers import Worker
from stagemesh.errors import InvalidRequest, MeshUnavailable, PeerLost, StageMeshError

# Failures of a successor after which the worker takes its place back.
_MAX_FAILURES = 2

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _Drain:
    drain_id: int
    worker: Worker
    to_worker_id: str
    stay: bool
    successor: Worker | None = None
    # What the successor has taken, once it has.
    place: tuple[MeshPipeline, int] | None = None
    # What came of the places that were handed over.
    successor_id: str = ""
    num_blocks_moved: int = 0
    # Numbers of workers that could not do it.
    tried: set[int] = field(default_factory=set)


class Drains:
    """`release` ends a worker's membership and its process."""

    def __init__(
        self,
        roster: Roster,
        formation: Formation,
        emit: Callable[[Effect], None],
        release: Callable[[Worker, int], None],
    ) -> None:
        self._roster = roster
        self._formation = formation
        self._emit = emit
        self._release = release
        self._numbers = count(1)
        self._drains: dict[int, _Drain] = {}

    def start(self, worker_id: str, to_worker_id: str, *, stay: bool, now_ns: int) -> int:
        """Returns the number by which its end is told. A worker that is being drained already is
        drained once. Raises InvalidRequest."""
        worker = self._roster.named(worker_id)
        if worker is None:
            raise InvalidRequest(f"there is no worker {worker_id}", param="worker_id")
        known = next((each for each in self._drains.values() if each.worker is worker), None)
        if known is not None:
            known.stay = known.stay and stay
            return known.drain_id
        if to_worker_id:
            self._check_successor(worker, to_worker_id, now_ns)
        drain = _Drain(next(self._numbers), worker, to_worker_id, stay)
        self._drains[drain.drain_id] = drain
        worker.is_draining = True
        log.info("a worker is drained", worker=worker_id, to=to_worker_id or None, stay=stay)
        return drain.drain_id

    def take_back(self, now_ns: int) -> None:
        """Before places are filled: those of successors that failed go back to whose they were."""
        for drain in self._drains.values():
            if drain.place is None or drain.successor is None:
                continue
            pipeline, stage = drain.place
            successor = drain.successor
            is_there = pipeline.workers[stage] is successor
            if is_there and successor.conduct.num_failures >= _MAX_FAILURES:
                failed = PeerLost(f"worker {successor.worker_id} could not take over")
                pipeline.vacate(successor, failed, now_ns)
            if pipeline.workers[stage] is None and drain.worker.session is not None:
                pipeline.place(stage, drain.worker)
                drain.place = None
                self._dismiss_successor(drain)

    def advance(self, now_ns: int) -> None:
        """After places were filled: vacant ones come first."""
        for drain in list(self._drains.values()):
            worker = drain.worker
            if self._roster.named(worker.worker_id) is not worker:
                if drain.place is not None:
                    self._note_move(drain)
                self._end(drain, None)
            elif drain.place is not None:
                pipeline, stage = drain.place
                is_elsewhere = pipeline.workers[stage] is not drain.successor
                if pipeline.is_serving or is_elsewhere:
                    self._note_move(drain)
                    self._go_on(drain, now_ns)
            else:
                self._go_on(drain, now_ns)

    # ---- inside --------------------------------------------------------------------------------

    def _go_on(self, drain: _Drain, now_ns: int) -> None:
        """With the place that came last: who had the worker first may find it whole again."""
        if places := drain.worker.pipelines:
            self._hand_over(drain, places[-1], now_ns)
        else:
            self._end(drain, None, now_ns)

    def _note_move(self, drain: _Drain) -> None:
        """The successor has the place, or whoever took it from there."""
        assert drain.place is not None
        if drain.successor is not None:
            mending = drain.place[0].mending
            drain.successor_id = drain.successor.worker_id
            drain.num_blocks_moved += mending.num_blocks_moved if mending else 0
            drain.successor.is_reserved = False
        drain.place = drain.successor = None

    def _hand_over(self, drain: _Drain, pipeline: MeshPipeline, now_ns: int) -> None:
        stage = pipeline.workers.index(drain.worker)
        span = pipeline.spans[stage]
        known = drain.successor
        if known is not None and not self._is_able(known, pipeline, stage):
            self._dismiss_successor(drain)
        if drain.successor is None:
            drain.successor = self._seek(drain, pipeline, stage, now_ns)
        successor = drain.successor
        if successor is None:
            is_wanted_elsewhere = bool(drain.to_worker_id) or drain.stay
            error = MeshUnavailable(f"nobody can take layers {span.start}:{span.end}")
            self._end(drain, error if is_wanted_elsewhere else None, now_ns)
            return
        successor.is_reserved = True
        if not successor.holds(span):
            self._formation.places.load_span(successor, span)
        elif not pipeline.handovers:
            pipeline.hand_over(stage, successor, now_ns)
            make_room(successor, pipeline, now_ns)
            successor.is_reserved = False
            drain.place = (pipeline, stage)

    def _seek(
        self, drain: _Drain, pipeline: MeshPipeline, stage: int, now_ns: int
    ) -> Worker | None:
        workers = [worker for worker in self._roster.workers if worker.number not in drain.tried]
        if drain.to_worker_id:
            workers = [worker for worker in workers if worker.worker_id == drain.to_worker_id]
        free = best_free(workers, pipeline, stage, now_ns)
        if free is not None or drain.stay:  # who stays would be given the place again
            return free
        return self._formation.sharing.stand_in(pipeline, stage, workers, now_ns)

    def _is_able(self, successor: Worker, pipeline: MeshPipeline, stage: int) -> bool:
        is_here = self._roster.named(successor.worker_id) is successor
        is_sound = successor.error is None and not successor.is_draining
        has_room = not successor.is_shared and successor.end_of(pipeline) is None
        suits = successor.suits(pipeline.spans[stage]) is not None
        return is_here and is_sound and has_room and suits

    def _dismiss_successor(self, drain: _Drain) -> None:
        assert drain.successor is not None
        drain.tried.add(drain.successor.number)
        drain.successor.is_reserved = False
        drain.successor = None

    def _check_successor(self, worker: Worker, to_worker_id: str, now_ns: int) -> None:
        """Raises InvalidRequest."""
        successor = self._roster.named(to_worker_id)
        if successor is None:
            raise InvalidRequest(f"there is no worker {to_worker_id}", param="to_worker_id")
        if not successor.is_free:
            raise InvalidRequest(f"worker {to_worker_id} is not free", param="to_worker_id")
        places = [(each, each.workers.index(worker)) for each in worker.pipelines]
        if not places:
            raise InvalidRequest(f"worker {worker.worker_id} has no place", param="worker_id")
        if any(successor.suits(pipeline.spans[stage]) is None for pipeline, stage in places):
            why = f"worker {to_worker_id} cannot hold the layers of {worker.worker_id}"
            raise InvalidRequest(why, param="to_worker_id")

    def _end(self, drain: _Drain, error: StageMeshError | None, now_ns: int | None = None) -> None:
        """With a time the worker is still here, and is let go unless there is an error."""
        del self._drains[drain.drain_id]
        worker, successor = drain.worker, drain.successor
        worker.is_draining = False
        if successor is not None:
            successor.is_reserved = False
        done = DrainDone(drain.drain_id, drain.successor_id, drain.num_blocks_moved, error)
        log.info(
            "a drain ended",
            worker=worker.worker_id,
            successor=done.successor_id or None,
            blocks_moved=done.num_blocks_moved,
            reason=str(error) if error else None,
        )
        if now_ns is not None and error is None and not drain.stay:
            self._release(worker, now_ns)
        self._emit(done)
