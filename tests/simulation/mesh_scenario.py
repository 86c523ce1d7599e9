"""What one seed of the larger world means: workers, gateways, requests, faults at their times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from simulation.arrivals import Arrival, draw_arrivals
from simulation.clock import MS, S
from simulation.pretend_model import NUM_LAYERS

from scheduler.core import SchedulerLimits
from scheduler.limits import MembershipLimits
from stagemesh.plan import Span

SCHEDULER = "scheduler"


@dataclass(frozen=True, slots=True)
class WorkerShape:
    name: str
    num_blocks: int
    num_log_blocks: int
    load_ns: int = 500 * MS
    compute_ns: int = 5 * MS
    start_ns: int = 0
    fixed_span: Span | None = None


Harm = Literal["crash", "freeze", "slow", "hang", "fault", "control", "data", "silence", "usurp"]
Kind = Harm | Literal["gone", "drain", "move", "sigterm"]


@dataclass(frozen=True, slots=True)
class Fault:
    """At `at_ns` something happens to the process `who`; it lasts `for_ns` where it lasts.

    crash: it dies, and another incarnation starts afterwards. gone: it dies, and none does, unless
    nobody else would be left. freeze: it stands still. slow: its
    steps take ten times as long. control: its control stream breaks. data: its outgoing data stream
    breaks. silence: what it sends on gets lost. hang: its device stands still. fault: its next step
    fails. drain: an operator has it replaced, and starts another process afterwards. move: it hands
    its span over and stays. sigterm: it asks to be replaced, and starts again. usurp: the scheduler
    freezes, another takes its place, and the old one thaws and lives on for a little.
    """

    at_ns: int
    kind: Kind
    who: str
    for_ns: int = 0


@dataclass(frozen=True, slots=True)
class MeshScenario:
    limits: SchedulerLimits
    membership: MembershipLimits
    workers: tuple[WorkerShape, ...]
    arrivals: tuple[Arrival, ...]
    faults: tuple[Fault, ...] = ()
    block_size: int = 4
    max_model_len: int = 64
    dynamic_rope: int = 0
    num_gateways: int = 1

    @property
    def end_ns(self) -> int:
        """When everybody is there for good."""
        ends = [fault.at_ns + fault.for_ns for fault in self.faults]
        return max([*ends, *(each.at_ns for each in self.arrivals)], default=0) + S


_GENTLE: tuple[Kind, ...] = ("drain", "move", "sigterm")


def gateway_name(number: int) -> str:
    return f"gateway{number}"


def draw_mesh(random: Random, num_replicas: int = 0) -> MeshScenario:
    """With a number of replicas: so many, of two stages at least, and no spare."""
    block_size = random.choice((2, 3, 4, 8))
    max_model_len = random.randint(16, 64)
    num_stages = random.choice((1, 2, 2, 3, 3, 4))
    num_spares = random.choice((0, 0, 1, 1, 2))
    if num_replicas:
        num_stages, num_spares = max(2, num_stages), 0
    num_replicas = num_replicas or random.choice((1, 1, 2, 2))
    num_workers = num_stages * num_replicas + num_spares
    membership = MembershipLimits(
        num_stages=num_stages if random.random() < 0.85 else 0,
        num_replicas=num_replicas,
        settle_ns=S,
        join_timeout_ns=5 * S,
        takeover_after_ns=random.choice((S, 10 * S)),
    )
    min_blocks = -(-max_model_len // block_size)
    calm = MeshScenario(
        limits=_limits(random),
        membership=membership,
        workers=tuple(_workers(random, num_workers, num_stages, min_blocks)),
        arrivals=_arrivals(random, max_model_len),
        block_size=block_size,
        max_model_len=max_model_len,
        dynamic_rope=random.choice((0, 0, max_model_len // 2)),
        num_gateways=random.choice((1, 1, 2)),
    )
    return calm if random.random() < 0.1 else replace(calm, faults=tuple(_faults(random, calm)))


def _limits(random: Random) -> SchedulerLimits:
    return SchedulerLimits(
        max_running_requests=random.choice((2, 5, 64)),
        max_step_tokens=random.choice((4, 16, 64)),
        max_chunk_tokens=random.choice((None, None, 7)),
        prefix_cache=random.random() < 0.8,
    )


def _workers(
    random: Random, num_workers: int, num_stages: int, min_blocks: int
) -> Iterator[WorkerShape]:
    """Now and then an operator has said who holds which layers."""
    bounds = [NUM_LAYERS * stage // num_stages for stage in range(num_stages + 1)]
    is_fixed = random.random() < 0.1
    for number in range(num_workers):
        stage = number % num_stages
        span = Span(bounds[stage], bounds[stage + 1]) if is_fixed else None
        yield replace(_worker(random, f"w{number}", min_blocks), fixed_span=span)


def _worker(random: Random, name: str, min_blocks: int) -> WorkerShape:
    """Each holds the longest request; a log may be shorter."""
    num_blocks = min_blocks * random.choice((1, 2, 3, 4, 6)) + random.randrange(3)
    return WorkerShape(
        name,
        num_blocks,
        num_log_blocks=random.choice((num_blocks, num_blocks, num_blocks // 4, 0)),
        load_ns=random.randint(20 * MS, S),
        compute_ns=random.choice((3 * MS, 20 * MS, 50 * MS)) + random.randrange(MS),
        start_ns=random.choice((0, random.randrange(2 * S))),
    )


def _arrivals(random: Random, max_model_len: int) -> tuple[Arrival, ...]:
    """Requests over some ten seconds, most of them long, none longer than what a worker holds."""
    arrivals = []
    for each in draw_arrivals(random, max_model_len - 1):
        request = each.request
        room = max_model_len - len(request.prompt_token_ids)
        if room < 1:
            continue
        at_ns = random.randrange(10 * S)
        deadline_ns = at_ns + random.randrange(20 * S) if random.random() < 0.1 else None
        max_tokens = room if random.random() < 0.5 else min(room, request.max_tokens)
        request = replace(request, attempt=0, max_tokens=max_tokens, deadline_ns=deadline_ns)
        abort_after_ns = random.randrange(5 * S) if random.random() < 0.1 else None
        arrivals.append(Arrival(at_ns, request, abort_after_ns=abort_after_ns))
    return tuple(sorted(arrivals, key=lambda arrival: arrival.at_ns))


def _faults(random: Random, scenario: MeshScenario) -> Iterator[Fault]:
    names = [worker.name for worker in scenario.workers]
    at_ns = S
    for _ in range(random.choice((1, 4, 8, 16))):
        at_ns += round(random.expovariate(1) * random.choice((50 * MS, 500 * MS, 1500 * MS)))
        kind: Kind = random.choice(
            ("crash", "crash", "freeze", "slow", "hang", "control", "data", "silence", *_GENTLE)
        )
        for_ns = random.choice((10 * MS, 100 * MS, 500 * MS, 3 * S, 8 * S))
        yield Fault(at_ns, kind, random.choice(names), for_ns)
    if random.random() < 0.2:
        yield Fault(random.randrange(8 * S), "fault", random.choice(names))
    if random.random() < 0.15 and not any(worker.fixed_span for worker in scenario.workers):
        yield Fault(random.randrange(10 * S), "gone", random.choice(names))
    elif random.random() < 0.25:
        kind = random.choice(("crash", "crash", "freeze", "freeze", "usurp"))
        for_ns = random.randrange(20 * S if kind == "usurp" else 4 * S)
        yield Fault(random.randrange(8 * S), kind, SCHEDULER, for_ns)
    if random.random() < 0.3:
        kind = random.choice(("crash", "crash", "freeze", "control"))
        who = gateway_name(random.randrange(scenario.num_gateways))
        yield Fault(random.randrange(8 * S), kind, who, random.randrange(4 * S))
