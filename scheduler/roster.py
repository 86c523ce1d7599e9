"""The list of workers: by name, by the session they speak on, by when they were last heard."""

from __future__ import annotations

from collections import OrderedDict

from scheduler.workers import Conduct, Worker

_MAX_CONDUCTS = 1024


class Roster:
    """A worker whose stream is broken has `grace_ns` to come back, a silent one `lease_ns`."""

    def __init__(self, lease_ns: int, grace_ns: int) -> None:
        self._lease_ns = lease_ns
        self._grace_ns = grace_ns
        self._by_id: dict[str, Worker] = {}
        self._by_session: dict[int, Worker] = {}
        self._conducts: OrderedDict[str, Conduct] = OrderedDict()

    @property
    def workers(self) -> list[Worker]:
        """In the order in which they registered."""
        return sorted(self._by_id.values(), key=lambda worker: worker.number)

    def named(self, worker_id: str) -> Worker | None:
        return self._by_id.get(worker_id)

    def on(self, session: int) -> Worker | None:
        """None for a session whose worker is gone, or speaks on another by now."""
        return self._by_session.get(session)

    def add(self, worker: Worker) -> None:
        worker.conduct = self._conduct_of(worker.worker_id)
        self._by_id[worker.worker_id] = worker
        if worker.session is not None:
            self._by_session[worker.session] = worker

    def attach(self, worker: Worker, session: int, now_ns: int) -> None:
        worker.session, worker.away_ns, worker.heard_ns = session, None, now_ns
        self._by_session[session] = worker

    def detach(self, worker: Worker, now_ns: int) -> int | None:
        """The session that the worker spoke on until now."""
        session, worker.session = worker.session, None
        if session is not None:
            worker.away_ns = now_ns
            del self._by_session[session]
        return session

    def remove(self, worker: Worker, now_ns: int) -> int | None:
        del self._by_id[worker.worker_id]
        return self.detach(worker, now_ns)

    def lost(self, now_ns: int) -> list[Worker]:
        """Whose lease or grace is over."""
        return [worker for worker in self._by_id.values() if now_ns >= self._end_ns(worker)]

    def next_end_ns(self) -> int | None:
        return min(map(self._end_ns, self._by_id.values()), default=None)

    def was_deaf(self, duration_ns: int) -> None:
        """Nobody could be heard for so long: that is no silence of theirs."""
        for worker in self._by_id.values():
            worker.heard_ns += duration_ns
            if worker.away_ns is not None:
                worker.away_ns += duration_ns

    def _end_ns(self, worker: Worker) -> int:
        lease_end_ns = worker.heard_ns + self._lease_ns
        if worker.away_ns is None:
            return lease_end_ns
        return min(lease_end_ns, worker.away_ns + self._grace_ns)

    def _conduct_of(self, worker_id: str) -> Conduct:
        conduct = self._conducts.setdefault(worker_id, Conduct())
        self._conducts.move_to_end(worker_id)
        while len(self._conducts) > _MAX_CONDUCTS:
            self._conducts.popitem(last=False)
        return conduct
