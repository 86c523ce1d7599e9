"""Requests of a scenario: when they come, how long prompt and output are. From a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from scheduler.core import Request, RequestKey
from stagemesh.sampling import SamplingSpec


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal, by median and spread (a factor), within [1, `longest`]."""

    median: int
    spread: float = 1.0
    longest: int = 8192

    def draw(self, chance: random.Random) -> int:
        drawn: float = self.median * self.spread ** chance.gauss(0.0, 1.0)
        return max(1, min(self.longest, round(drawn)))


@dataclass(frozen=True, slots=True)
class Arrival:
    at_ns: int
    num_prompt: int
    num_output: int


@dataclass(frozen=True, slots=True)
class Load:
    """`num_at_once` come at 0, then `rate_per_s` by a Poisson process, until `duration_s`.

    With `closed`, each that ends is followed at once by another one instead.
    """

    prompts: Lengths
    outputs: Lengths
    num_at_once: int = 0
    rate_per_s: float = 0.0
    closed: bool = False
    extra: tuple[Arrival, ...] = ()

    def open_arrivals(self, duration_s: float, chance: random.Random) -> Iterator[Arrival]:
        """In no order."""
        for _ in range(self.num_at_once):
            yield self.draw(0, chance)
        at_s = 0.0
        while self.rate_per_s and (at_s := at_s + chance.expovariate(self.rate_per_s)) < duration_s:
            yield self.draw(round(at_s * 1e9), chance)
        yield from self.extra

    def draw(self, at_ns: int, chance: random.Random) -> Arrival:
        return Arrival(at_ns, self.prompts.draw(chance), self.outputs.draw(chance))


def request_of(number: int, arrival: Arrival) -> Request:
    """No two share a block, since the first token is the request's own."""
    return Request(
        key=RequestKey(1, number),
        attempt=0,
        label="",
        prompt_token_ids=(number, *[0] * (arrival.num_prompt - 1)),
        output_token_ids=(),
        sampling=SamplingSpec(),
        max_tokens=arrival.num_output,
    )
