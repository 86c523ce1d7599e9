"""Two replicas that are cut differently, so that they have only a part of their layers in common.

a0 0:1, a1 1:2 and a2 2:4 are one, b0 0:1, b1 1:2, b2 2:3 and b3 3:4 the other: what a2 holds nobody
else does, nor what b2 and b3 hold. So either can be broken without help from the other.
"""

from __future__ import annotations

from simulation.arrivals import Arrival
from simulation.clock import MS, S
from simulation.examples import arrival
from simulation.mesh_scenario import Fault, MeshScenario, WorkerShape

from scheduler.core import SchedulerLimits
from scheduler.limits import MembershipLimits
from stagemesh.plan import Span

# A context of 64 tokens takes half of them.
NUM_BLOCKS = 32
_SPANS = {
    "a0": Span(0, 1),
    "a1": Span(1, 2),
    "a2": Span(2, 4),
    "b0": Span(0, 1),
    "b1": Span(1, 2),
    "b2": Span(2, 3),
    "b3": Span(3, 4),
}


def uneven_replicas(arrivals: tuple[Arrival, ...], *faults: Fault) -> MeshScenario:
    return MeshScenario(
        limits=SchedulerLimits(),
        membership=MembershipLimits(num_stages=3, num_replicas=2, settle_ns=S),
        workers=tuple(
            WorkerShape(
                name,
                NUM_BLOCKS,
                NUM_BLOCKS,
                load_ns=200 * MS,
                compute_ns=20 * MS,
                start_ns=S if name.startswith("b") else 0,
                fixed_span=span,
            )
            for name, span in _SPANS.items()
        ),
        arrivals=arrivals,
        faults=faults,
    )


def streams(
    at_ns: int, num: int, *, first: int = 0, num_prompt: int = 20, max_tokens: int = 40
) -> tuple[Arrival, ...]:
    return tuple(
        arrival(number, num_prompt=num_prompt, max_tokens=max_tokens, at_ns=at_ns + number * MS)
        for number in range(first, first + num)
    )


# ---- what happens to them ----------------------------------------------------------------------

# What some ask for again later, with equal prompts, is found in the prefix cache if it is there.
_AGAIN = 40


def kv_is_written_over() -> MeshScenario:
    """b0 is lent to the first replica, given up for lack of a2, and used as a whole by the second
    one, when a2 comes back with all of its KV."""
    asked = streams(4 * S, 4, max_tokens=4)
    others = streams(20 * S, 3, first=12, max_tokens=16)
    again = streams(25 * S, 4, first=_AGAIN, max_tokens=4)
    gone = Fault(3 * S, "gone", "a0")
    return uneven_replicas((*asked, *others, *again), gone, Fault(7 * S, "freeze", "a2", 16 * S))


def kv_is_written_over_in_part() -> MeshScenario:
    """b0 serves the first replica while the second one, which had all of it, lacks b3."""
    asked = streams(3 * S, 8, max_tokens=4)
    others = streams(7 * S, 2, first=12, max_tokens=40)
    again = streams(14 * S, 8, first=_AGAIN, max_tokens=4)
    lent = Fault(7500 * MS, "crash", "a0", 500 * MS)
    return uneven_replicas((*asked, *others, *again), Fault(5 * S, "freeze", "b3", 5 * S), lent)


def kv_lies_at_the_end() -> MeshScenario:
    """The first replica is alone on b0 in the end, of which it has had the end, and then loses its
    place there for a while."""
    asked = streams(9500 * MS, 4, max_tokens=4)
    again = streams(19 * S, 4, first=_AGAIN, max_tokens=4)
    gone = Fault(3 * S, "gone", "a0"), Fault(4 * S, "gone", "b3")
    return uneven_replicas((*asked, *again), *gone, Fault(12 * S, "freeze", "b0", 4 * S))


def pages_are_fetched_for_long() -> MeshScenario:
    """a0 has its place back, but stands still before it fetches its pages from b0, whose own
    pipeline begins an epoch meanwhile."""
    handed_over_ns = 3808 * MS
    return uneven_replicas(
        (*streams(2 * S, 4, max_tokens=4), *streams(3300 * MS, 8, first=4)),
        Fault(3 * S, "crash", "a0", 500 * MS),
        Fault(handed_over_ns, "freeze", "a0", 1400 * MS),
        Fault(handed_over_ns + 20 * MS, "data", "b1"),
    )


SCENARIOS = (
    kv_is_written_over,
    kv_is_written_over_in_part,
    kv_lies_at_the_end,
    pages_are_fetched_for_long,
)
