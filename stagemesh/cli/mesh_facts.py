"""Where a mesh on this host is reached and which processes it has: what the ready file says."""

from __future__ import annotations

from dataclasses import dataclass

from protos import mesh_pb2
from stagemesh.addresses import is_wildcard, join_address, split_address


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """One process of the mesh.

    Of a worker the layers [start_layer, end_layer) that it had when the mesh first served; a spare
    had none then, or those that it holds in reserve.
    """

    role: str
    id: str
    pid: int
    address: str
    start_layer: int | None = None
    end_layer: int | None = None
    spare: bool = False

    @classmethod
    def of_worker(cls, worker: mesh_pb2.WorkerStatus) -> ProcessFacts:
        has_layers = worker.HasField("span")
        return cls(
            "worker",
            worker.worker_id,
            worker.pid,
            worker.address,
            start_layer=worker.span.start if has_layers else None,
            end_layer=worker.span.end if has_layers else None,
            spare=worker.state != mesh_pb2.WORKER_STATE_SERVING,
        )

    def line(self) -> str:
        layers = f"layers {self.start_layer}:{self.end_layer}"
        return f"  {self.id:<9}  {'spare' if self.spare else layers}, pid {self.pid}"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a serving mesh is reached, as host:port."""

    grpc: str
    http: str
    scheduler: str
    processes: tuple[ProcessFacts, ...]

    def worker_lines(self) -> list[str]:
        """One line per worker, in the order of the layers, spares last."""
        workers = [process for process in self.processes if process.role == "worker"]
        workers.sort(key=lambda worker: (worker.spare, worker.start_layer or 0, worker.id))
        return [worker.line() for worker in workers]


def dialled(bound: object) -> str:
    """Where this host reaches a server that is bound to `bound`, maybe a wildcard."""
    host, port = split_address(str(bound))
    return join_address("127.0.0.1" if is_wildcard(host) else host, port)
