"""The requests of a scenario, and what their clients will do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from simulation.clock import MS
from simulation.pretend_model import ADAPTERS, VOCAB_SIZE

from scheduler.core import Request, RequestKey
from stagemesh.sampling import SamplingSpec


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and what its client will do: abort, send again, try anew (times since arrival)."""

    at_ns: int
    request: Request
    poison: int | None = None
    abort_after_ns: int | None = None
    again_after_ns: int | None = None
    next_attempt_after_ns: int | None = None


def draw_arrivals(random: Random, longest: int) -> tuple[Arrival, ...]:
    prefixes = [_tokens(random, random.randint(1, longest)) for _ in range(3)]
    mean_gap_ns = random.choice((0, MS, 10 * MS))
    num_bad = random.choice((0.0, 0.1, 0.3))
    now_ns, arrivals = 0, []
    for number in range(random.randint(1, 30)):
        now_ns += round(random.expovariate(1) * mean_gap_ns)
        arrivals.append(_arrival(random, number, now_ns, longest, prefixes, num_bad))
    # In every other world, and not drawn, so that worlds without are what they always were.
    if sum(prefixes[0]) % 2 == 0:
        arrivals = [_with_adapter(arrival, i) for i, arrival in enumerate(arrivals)]
    return tuple(arrivals)


def _with_adapter(arrival: Arrival, number: int) -> Arrival:
    adapter = ADAPTERS[number % len(ADAPTERS)]
    return replace(arrival, request=replace(arrival.request, adapter=adapter))


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
