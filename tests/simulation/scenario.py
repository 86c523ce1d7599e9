"""What one seed means: a mesh, its limits, its faults and the requests that come, all drawn."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from simulation.pretend_model import NUM_LAYERS, VOCAB_SIZE

from scheduler.core import Request, RequestKey, SchedulerLimits
from stagemesh.sampling import SamplingSpec

MS = 1_000_000


@dataclass(frozen=True, slots=True)
class PipelineShape:
    """`cuts`: the layers at which the next stage begins. A step takes a stage `latencies_ns`, more
    or less: a share of up to `jitter`."""

    cuts: tuple[int, ...]
    num_blocks: int
    block_size: int
    max_model_len: int
    latencies_ns: tuple[int, ...]
    jitter: float = 0.5

    @property
    def num_stages(self) -> int:
        return len(self.cuts) + 1

    @property
    def capacity(self) -> int:
        return min(self.max_model_len, self.num_blocks * self.block_size)


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities: a result is lost, or doubled, a broken step is given up; and the mean time
    between breaks."""

    lost: float
    doubled: float
    mean_break_ns: int | None
    given_up: float = 0.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and what its client will do: abort, send again, try anew (times since arrival)."""

    at_ns: int
    request: Request
    poison: int | None
    abort_after_ns: int | None
    again_after_ns: int | None
    next_attempt_after_ns: int | None


@dataclass(frozen=True, slots=True)
class Scenario:
    limits: SchedulerLimits
    shapes: tuple[PipelineShape, ...]
    faults: Faults
    dynamic_rope: int
    arrivals: tuple[Arrival, ...]
    gateway_deaths: tuple[tuple[int, int], ...]  # (time, gateway)

    @property
    def end_ns(self) -> int:
        """When the faults stop, so that everything can end."""
        return self.arrivals[-1].at_ns + 100 * MS


def draw(random: Random) -> Scenario:
    shapes = tuple(_shape(random) for _ in range(random.choice((1, 1, 1, 2, 3))))
    longest = max(shape.capacity for shape in shapes)
    arrivals = _arrivals(random, longest)
    end_ns = arrivals[-1].at_ns
    deaths = [(random.randrange(end_ns + 1), random.randrange(3))] if random.random() < 0.2 else []
    return Scenario(
        limits=_limits(random),
        shapes=shapes,
        faults=_faults(random),
        dynamic_rope=random.choice((0, 0, longest // 2)),
        arrivals=arrivals,
        gateway_deaths=tuple(deaths),
    )


def _shape(random: Random) -> PipelineShape:
    num_stages = random.choice((1, 2, 2, 3, 4))
    block_size = random.choice((1, 2, 3, 4, 8))
    capacity = random.randint(12, 70)
    num_blocks = -(-capacity // block_size) * random.choice((1, 1, 2, 4))
    return PipelineShape(
        cuts=tuple(sorted(random.sample(range(1, NUM_LAYERS), num_stages - 1))),
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=capacity,
        latencies_ns=tuple(random.randint(1, 3 * MS) for _ in range(num_stages)),
    )


def _limits(random: Random) -> SchedulerLimits:
    return SchedulerLimits(
        max_waiting_requests=random.choice((4, 1000, 1000, 1000)),
        max_running_requests=random.choice((2, 5, 64)),
        max_step_tokens=random.choice((1, 2, 5, 16, 64)),
        max_chunk_tokens=random.choice((None, None, 3, 7)),
        prefix_cache=random.random() < 0.8,
        max_steps_in_flight=random.choice((None, None, None, 1, 6)),
    )


def _faults(random: Random) -> Faults:
    if random.random() < 0.3:
        return Faults(0.0, 0.0, None)
    return Faults(
        lost=random.choice((0.0, 0.02)),
        doubled=random.choice((0.0, 0.1)),
        mean_break_ns=random.choice((None, 20 * MS, 100 * MS)),
        given_up=random.choice((0.0, 0.0, 0.2)),
    )


def _arrivals(random: Random, longest: int) -> tuple[Arrival, ...]:
    prefixes = [_tokens(random, random.randint(1, longest)) for _ in range(3)]
    mean_gap_ns = random.choice((0, MS, 10 * MS))
    num_bad = random.choice((0.0, 0.1, 0.3))
    now_ns, arrivals = 0, []
    for number in range(random.randint(1, 30)):
        now_ns += round(random.expovariate(1) * mean_gap_ns)
        arrivals.append(_arrival(random, number, now_ns, longest, prefixes, num_bad))
    return tuple(arrivals)


def _arrival(
    random: Random,
    number: int,
    now_ns: int,
    longest: int,
    prefixes: list[tuple[int, ...]],
    bad: float,
) -> Arrival:
    def perhaps(probability: float, max_ns: int) -> int | None:
        return random.randrange(max_ns) if random.random() < probability else None

    prompt = _prompt(random, longest, prefixes)
    max_tokens = random.randint(1, random.choice((3, 20, longest)))
    deadline_after_ns = perhaps(bad, 100 * MS)
    request = Request(
        key=RequestKey(random.randrange(3), number),
        attempt=random.choice((0, 1)),
        label=f"r{number}",
        prompt_token_ids=prompt,
        output_token_ids=(),
        sampling=_sampling(random, number),
        max_tokens=max_tokens,
        priority=random.choice((0, 0, 0, 0, -1, 3)),
        deadline_ns=None if deadline_after_ns is None else now_ns + deadline_after_ns,
        cache_salt=random.choice(("", "", "tenant")),
    )
    is_poisoned = random.random() < bad / 2
    return Arrival(
        at_ns=now_ns,
        request=request,
        poison=len(prompt) - 1 + random.randrange(max_tokens) if is_poisoned else None,
        abort_after_ns=perhaps(bad, 50 * MS),
        again_after_ns=perhaps(bad, 50 * MS),
        next_attempt_after_ns=perhaps(bad, 50 * MS),
    )


def _prompt(random: Random, longest: int, prefixes: list[tuple[int, ...]]) -> tuple[int, ...]:
    if random.random() < 0.02:
        return _tokens(random, longest + random.randrange(3))
    prefix = random.choice((*prefixes, ()))
    tail = _tokens(random, random.randint(0, max(1, longest - len(prefix))))
    return (prefix + tail)[: random.randint(1, longest - 1)] or prefixes[0][:1]


def _tokens(random: Random, num_tokens: int) -> tuple[int, ...]:
    return tuple(random.randrange(VOCAB_SIZE) for _ in range(num_tokens))


def _sampling(random: Random, number: int) -> SamplingSpec:
    return SamplingSpec(
        seed=number,
        min_tokens=random.choice((0, 0, 4)),
        stop_token_ids=tuple(random.sample(range(VOCAB_SIZE), random.choice((0, 0, 1, 4)))),
        num_prompt_logprobs=random.choice((None, None, None, 0)),
    )
