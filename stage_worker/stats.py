"""What a worker has done since it started, and what memory it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from protos import mesh_pb2
from stage_worker.occupancy import Doing, Occupancy
from stage_worker.rank_processes import RankProcesses
from stagemesh.plan import HopTiming
from stagemesh.transport import Traffic


@dataclass(slots=True)
class Stats:
    """Totals since the process started."""

    steps_executed: int = 0
    rows_executed: int = 0
    tokens_executed: int = 0
    compute_ns: int = 0
    idle_ns: int = 0
    blocks_received: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    occupancy: Occupancy = field(default_factory=Occupancy)
    ranks: RankProcesses | None = None

    def count_step(self, num_rows: int, num_tokens: int, timing: HopTiming) -> None:
        self.steps_executed += 1
        self.rows_executed += num_rows
        self.tokens_executed += num_tokens
        self.compute_ns += timing.compute_ns
        self.idle_ns += timing.idle_ns

    def to_proto(
        self,
        steps_queued: int,
        sequences_held: int,
        available_bytes: int,
        routing: Mapping[int, Sequence[int]],
    ) -> mesh_pb2.WorkerStats:
        """`routing`: how many tokens each expert of a layer was given."""
        spent_ns = self.occupancy.spent_ns()
        return mesh_pb2.WorkerStats(
            rss_anon_bytes=self._rss_anon_bytes(),
            steps_executed=self.steps_executed,
            rows_executed=self.rows_executed,
            tokens_executed=self.tokens_executed,
            compute_ns=self.compute_ns,
            idle_ns=self.idle_ns,
            steps_queued=steps_queued,
            bytes_sent=self.traffic.bytes_sent,
            messages_sent=self.traffic.messages_sent,
            sequences_held=sequences_held,
            available_memory_bytes=available_bytes,
            blocks_received=self.blocks_received,
            busy_ns=spent_ns[Doing.COMPUTING],
            output_wait_ns=spent_ns[Doing.WRITING],
            serialise_ns=spent_ns[Doing.SERIALISING],
            input_wait_ns=spent_ns[Doing.WAITING],
            routing=[
                mesh_pb2.LayerRouting(layer=layer, tokens=tokens)
                for layer, tokens in routing.items()
            ],
        )

    def _rss_anon_bytes(self) -> int:
        """Of all of the worker's processes."""
        others = self.ranks.pids if self.ranks is not None else []
        return rss_anon_bytes() + sum(rss_anon_bytes(pid) for pid in others)


def rss_anon_bytes(pid: int | str = "self") -> int:
    """Anonymous resident memory of a process; 0 where the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
