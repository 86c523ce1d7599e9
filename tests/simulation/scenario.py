"""What one seed means: a mesh, its limits, its faults and the requests that come, all drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from simulation.arrivals import Arrival, draw_arrivals
from simulation.clock import MS
from simulation.pretend_model import NUM_LAYERS

from scheduler.core import SchedulerLimits


@dataclass(frozen=True, slots=True)
class PipelineShape:
    """`cuts`: the layers at which the next stage begins. A step takes a stage `latencies_ns`, more
    or less: a share of up to `jitter`. Stage i logs what it sends for `log_blocks[i]` blocks."""

    cuts: tuple[int, ...]
    num_blocks: int
    block_size: int
    max_model_len: int
    latencies_ns: tuple[int, ...]
    jitter: float = 0.5
    log_blocks: tuple[int, ...] = ()

    @property
    def num_stages(self) -> int:
        return len(self.cuts) + 1


@dataclass(frozen=True, slots=True)
class Break:
    """A pipeline's epoch ends, and after `away_ns` another begins.

    Workers of `lost` stages are others by then, those of `moved` others that were given the pages;
    they have `num_blocks` blocks where it is not 0. Where the pipeline dissolves, all is lost and
    the core is told that it is gone. Where it gives up, the oldest step's requests are failed.
    """

    at_ns: int
    pipeline: int = 0
    away_ns: int = 5 * MS
    lost: tuple[int, ...] = ()
    moved: tuple[int, ...] = ()
    num_blocks: int = 0
    dissolves: bool = False
    gives_up: bool = False


@dataclass(frozen=True, slots=True)
class Slowness:
    """A stage takes `factor` times as long, for a while."""

    at_ns: int
    for_ns: int
    pipeline: int
    stage: int
    factor: int


@dataclass(frozen=True, slots=True)
class Scenario:
    """`lost` and `doubled` are probabilities of a result; `gateway_deaths`: (time, gateway)."""

    limits: SchedulerLimits
    shapes: tuple[PipelineShape, ...]
    arrivals: tuple[Arrival, ...]
    breaks: tuple[Break, ...] = ()
    slowness: tuple[Slowness, ...] = ()
    lost: float = 0.0
    doubled: float = 0.0
    dynamic_rope: int = 0
    gateway_deaths: tuple[tuple[int, int], ...] = ()

    @property
    def end_ns(self) -> int:
        """When faults stop, so that everything can end."""
        return max((arrival.at_ns for arrival in self.arrivals), default=0) + 150 * MS


def draw(random: Random) -> Scenario:
    shapes = tuple(_shape(random) for _ in range(random.choice((1, 1, 1, 2, 3))))
    longest = max(min(s.max_model_len, s.num_blocks * s.block_size) for s in shapes)
    arrivals = draw_arrivals(random, longest)
    calm = Scenario(
        _limits(random), shapes, arrivals, dynamic_rope=random.choice((0, longest // 2))
    )
    if random.random() < 0.2:
        return calm
    end_ns = arrivals[-1].at_ns
    deaths = ((random.randrange(end_ns + 1), random.randrange(3)),) * (random.random() < 0.2)
    return replace(
        calm,
        breaks=tuple(_breaks(random, calm)),
        slowness=tuple(_slowness(random, calm)),
        lost=random.choice((0.0, 0.0, 0.02)),
        doubled=random.choice((0.0, 0.1)),
        gateway_deaths=deaths,
    )


# ---- pipelines -------------------------------------------------------------------------------


def _shape(random: Random) -> PipelineShape:
    num_stages = random.choice((1, 2, 3, 3, 4, 4))
    block_size = random.choice((1, 2, 3, 4, 8))
    capacity = random.randint(12, 70)
    num_blocks = -(-capacity // block_size) * random.choice((1, 1, 2, 4))
    log_blocks = random.choice((2 * num_blocks, num_blocks // 2, num_blocks // 6))
    return PipelineShape(
        cuts=tuple(sorted(random.sample(range(1, NUM_LAYERS), num_stages - 1))),
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=capacity,
        latencies_ns=tuple(random.randint(1, 3 * MS) for _ in range(num_stages)),
        log_blocks=tuple(random.choice((0, log_blocks, log_blocks)) for _ in range(num_stages - 1)),
    )


def _breaks(random: Random, scenario: Scenario) -> Iterator[Break]:
    mean_ns = random.choice((15 * MS, 30 * MS, 100 * MS))
    for number, shape in enumerate(scenario.shapes):
        at_ns = 0
        while (at_ns := at_ns + round(random.expovariate(1) * mean_ns)) < scenario.end_ns:
            yield draw_break(random, shape, at_ns, number)


def draw_break(random: Random, shape: PipelineShape, at_ns: int, pipeline: int) -> Break:
    stages = range(shape.num_stages)
    num_lost = min(random.choice((0, 1, 1, 1, 1, 1, 2, 2, 4)), shape.num_stages)
    lost = tuple(sorted(random.sample(stages, num_lost)))
    others = [stage for stage in stages if stage not in lost]
    moved = (random.choice(others),) if others and random.random() < 0.25 else ()
    is_other_size = random.random() < 0.2
    return Break(
        at_ns,
        pipeline,
        away_ns=random.randint(0, 10 * MS),
        lost=lost,
        moved=moved,
        num_blocks=random.randint(1, 2 * shape.num_blocks) if is_other_size else 0,
        dissolves=random.random() < 0.05,
        gives_up=random.random() < 0.05,
    )


def _slowness(random: Random, scenario: Scenario) -> Iterator[Slowness]:
    for number, shape in enumerate(scenario.shapes):
        if random.random() < 0.3:
            at_ns, for_ns = random.randrange(scenario.end_ns), random.randrange(100 * MS)
            stage, factor = random.randrange(shape.num_stages), random.choice((3, 10))
            yield Slowness(at_ns, for_ns, number, stage, factor)


def _limits(random: Random) -> SchedulerLimits:
    return SchedulerLimits(
        max_waiting_requests=random.choice((4, 1000, 1000, 1000)),
        max_running_requests=random.choice((2, 5, 64)),
        max_step_tokens=random.choice((1, 2, 5, 16, 64)),
        max_chunk_tokens=random.choice((None, None, 3, 7)),
        prefix_cache=random.random() < 0.8,
        max_steps_in_flight=random.choice((None, None, None, 1, 6)),
    )
