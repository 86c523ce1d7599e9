"""A mesh of three stages and four streams, and what happens to it."""

from __future__ import annotations

from simulation.arrivals import Arrival
from simulation.clock import MS, S
from simulation.examples import arrival
from simulation.mesh_scenario import Fault, Kind, MeshScenario, WorkerShape

from scheduler.core import SchedulerLimits
from scheduler.limits import MembershipLimits

# All three stages serve by then, and the streams below go on for seconds.
STRUCK_NS = 3 * S


def mesh(
    *faults: Fault, num_spares: int = 0, log_blocks: int = 64, max_tokens: int = 40
) -> MeshScenario:
    """Workers w0, w1 and w2, and spares after them."""
    streams: tuple[Arrival, ...] = tuple(
        arrival(number, num_prompt=20, max_tokens=max_tokens, at_ns=2 * S + number * MS)
        for number in range(4)
    )
    return MeshScenario(
        limits=SchedulerLimits(),
        membership=MembershipLimits(num_stages=3, num_replicas=1, settle_ns=S),
        workers=tuple(
            WorkerShape(
                f"w{number}",
                64,
                log_blocks,
                load_ns=200 * MS,
                compute_ns=20 * MS,
                start_ns=number * 20 * MS,
            )
            for number in range(3 + num_spares)
        ),
        arrivals=streams,
        faults=faults,
    )


def struck(kind: Kind, who: str, at_ns: int = STRUCK_NS, for_ns: int = 0) -> Fault:
    return Fault(at_ns, kind, who, for_ns)


def pages_do_not_come() -> MeshScenario:
    """The device of a worker that hands over stands still: its successor gets nothing."""
    hangs = struck("hang", "w1", at_ns=STRUCK_NS + 100 * MS, for_ns=3500 * MS)
    return mesh(struck("drain", "w1"), hangs, num_spares=1)
