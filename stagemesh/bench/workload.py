"""What a load consists of: which requests, how long each is, when it is due.

Pure: a seed decides everything that is drawn. Knows neither clients nor clocks.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from stagemesh.bench.traces import TraceEntry
from stagemesh.errors import ConfigError

_LENGTHS = re.compile(r"([0-9]+)(?:-([0-9]+))?")


class LoadKind(Enum):
    """Who decides when a request is sent."""

    BATCH = "batch"
    """All at once, and no more."""
    CONCURRENCY = "concurrency"
    """Closed loop: so many are under way, the next is sent when one has ended."""
    RATE = "rate"
    """Open loop: so many a second, at random (Poisson), whatever has become of the others."""
    TRACE = "trace"
    """Open loop: when a trace says; the level makes it faster."""


@dataclass(frozen=True, slots=True)
class Load:
    """`level` is the number of requests at a time, or a second, or the factor on a trace's rate."""

    kind: LoadKind
    level: float

    @property
    def is_open(self) -> bool:
        return self.kind in (LoadKind.RATE, LoadKind.TRACE)

    def __str__(self) -> str:
        unit = {LoadKind.RATE: "/s", LoadKind.TRACE: "x"}.get(self.kind, "")
        return f"{self.kind.value} {self.level:g}{unit}"


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a prompt or an output: evenly drawn from [low, high], the ends included."""

    low: int
    high: int

    @classmethod
    def read(cls, text: str) -> Lengths:
        """ "128", or "64-256". Raises ValueError that goes on from an option's name."""
        match = _LENGTHS.fullmatch(text.strip())
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high:
            raise ValueError(f"must be lengths such as 128 or 64-256, not {text!r}")
        return cls(low, high)

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to be made.

    `seed` decides the prompt's content. Prompts of one `salt` that begin with the same `blocks`,
    each of `block_tokens`, begin with the same tokens. `cancel_after_tokens`: the client leaves
    then.
    """

    prompt_tokens: int
    output_tokens: int
    seed: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0
    salt: str = ""
    cancel_after_tokens: int | None = None


def drawn_asks(num: int, prompt: Lengths, output: Lengths, seed: str) -> list[Ask]:
    rng = random.Random(seed)
    return [Ask(prompt.draw(rng), output.draw(rng), rng.getrandbits(32)) for _ in range(num)]


def trace_asks(
    entries: Sequence[TraceEntry], seed: str, *, length_scale: float = 1.0, max_tokens: int = 0
) -> tuple[list[Ask], list[float], int]:
    """(requests, their arrivals in seconds, how many were left out).

    Lengths are multiplied by `length_scale`. What is longer than `max_tokens` together (0: no
    limit) is left out, since cutting it would make another load of it.
    """
    rng = random.Random(seed)
    asks, arrivals_s = [], []
    for entry in entries:
        ask = _scaled(entry, length_scale, rng.getrandbits(32), seed)
        if max_tokens and ask.prompt_tokens + ask.output_tokens > max_tokens:
            continue
        asks.append(ask)
        arrivals_s.append(entry.arrival_s)
    return asks, arrivals_s, len(entries) - len(asks)


def _scaled(entry: TraceEntry, scale: float, seed: int, salt: str) -> Ask:
    return Ask(
        prompt_tokens=max(1, round(entry.prompt_tokens * scale)),
        output_tokens=max(1, round(entry.output_tokens * scale)),
        seed=seed,
        blocks=entry.blocks,
        block_tokens=max(1, round(entry.block_tokens * scale)) if entry.blocks else 0,
        # Another run of the trace finds nothing of this one in a prefix cache.
        salt=salt,
    )


def with_cancels(asks: Sequence[Ask], share: float, seed: str) -> list[Ask]:
    """The same requests, a share of which the client gives up somewhere in mid-stream."""
    rng = random.Random(seed)
    return [_perhaps_cancelled(ask, share, rng) for ask in asks]


def _perhaps_cancelled(ask: Ask, share: float, rng: random.Random) -> Ask:
    if rng.random() >= share or ask.output_tokens < 2:
        return ask
    return replace(ask, cancel_after_tokens=rng.randrange(1, ask.output_tokens))


def poisson_arrivals_s(rate_per_s: float, num: int, seed: str) -> list[float]:
    """Times from 0 on with exponentially distributed gaps, of a mean of 1 / rate."""
    rng, now_s, times_s = random.Random(seed), 0.0, []
    for _ in range(num):
        now_s += rng.expovariate(rate_per_s)
        times_s.append(now_s)
    return times_s


def replayed_arrivals_s(arrivals_s: Sequence[float], rate_scale: float) -> list[float]:
    """A trace's own arrivals, from 0 on, with the rate multiplied."""
    if not arrivals_s:
        return []
    first_s = min(arrivals_s)
    return [(arrival_s - first_s) / rate_scale for arrival_s in arrivals_s]


def whole_numbers(name: str, texts: Sequence[str]) -> tuple[int, ...]:
    """Positive numbers of an option that is a list. Raises ConfigError, naming it."""
    if not all(text.isdecimal() and int(text) > 0 for text in texts):
        raise ConfigError(f"{name} must be whole numbers such as 1,8,32, not {','.join(texts)}")
    return tuple(map(int, texts))


def positive_numbers(name: str, texts: Sequence[str]) -> tuple[float, ...]:
    """The same for numbers that need not be whole."""
    try:
        numbers = tuple(map(float, texts))
    except ValueError:
        numbers = (0.0,)
    if not all(0 < number < float("inf") for number in numbers):
        raise ConfigError(f"{name} must be positive numbers such as 0.5,2, not {','.join(texts)}")
    return numbers
