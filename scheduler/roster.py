"""The list of workers: by name, by the session they speak on, by when they were last heard."""

from __future__ import annotations

from scheduler.workers import Worker


class Roster:
    def __init__(self, lease_ns: int) -> None:
        self._lease_ns = lease_ns
        self._by_id: dict[str, Worker] = {}
        self._by_session: dict[int, Worker] = {}

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
        self._by_id[worker.worker_id] = worker
        if worker.session is not None:
            self._by_session[worker.session] = worker

    def attach(self, worker: Worker, session: int) -> None:
        worker.session = session
        self._by_session[session] = worker

    def detach(self, worker: Worker) -> int | None:
        """The session that the worker spoke on until now."""
        session, worker.session = worker.session, None
        if session is not None:
            del self._by_session[session]
        return session

    def remove(self, worker: Worker) -> int | None:
        del self._by_id[worker.worker_id]
        return self.detach(worker)

    def silent(self, now_ns: int) -> list[Worker]:
        """Whose lease is over."""
        return [w for w in self._by_id.values() if now_ns >= w.heard_ns + self._lease_ns]

    def next_lease_end_ns(self) -> int | None:
        heard_ns = min((worker.heard_ns for worker in self._by_id.values()), default=None)
        return None if heard_ns is None else heard_ns + self._lease_ns
