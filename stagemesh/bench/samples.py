"""What came of one request, as its client saw it, and the latencies that follow from it.

Times are seconds since the run began. Latencies count from when the request was due, not from when
it was sent: a client or server that falls behind may not hide it (coordinated omission).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from stagemesh.bench.workload import Ask


@dataclass(slots=True)
class Sample:
    """`deliveries` are (time, number of tokens), one for each message with tokens.

    A server that does not say how many tokens a message has counts as one each until its usage
    comes. `error` says what went wrong; `cancelled`: the client gave it up, as was planned.
    """

    ask: Ask
    due_s: float
    sent_s: float = 0.0
    ended_s: float = 0.0
    deliveries: list[tuple[float, float]] = field(default_factory=list)
    prompt_tokens: int | None = None
    cached_prompt_tokens: int | None = None
    output_tokens: int = 0
    cancelled: bool = False
    error: str | None = None

    @property
    def is_whole(self) -> bool:
        return self.error is None and not self.cancelled

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token."""
        return self.deliveries[0][0] - self.due_s if self.deliveries else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None where there is but one."""
        if len(self.deliveries) < 2:
            return None
        rest = self.output_tokens - self.deliveries[0][1]
        return (self.deliveries[-1][0] - self.deliveries[0][0]) / rest if rest > 0 else None

    @property
    def itls_s(self) -> list[float]:
        """Times between two messages with tokens."""
        times_s = [time_s for time_s, _ in self.deliveries]
        return [b - a for a, b in pairwise(times_s)]

    @property
    def e2e_s(self) -> float | None:
        return self.ended_s - self.due_s if self.is_whole else None

    def take_usage(self, prompt_tokens: int, output_tokens: int, cached: int | None) -> None:
        """The server's count, which wins: messages of unknown size share the tokens evenly."""
        self.prompt_tokens, self.cached_prompt_tokens = prompt_tokens, cached
        counted = sum(num for _, num in self.deliveries)
        if counted and counted != output_tokens:
            factor = output_tokens / counted
            self.deliveries = [(time_s, num * factor) for time_s, num in self.deliveries]
        self.output_tokens = output_tokens
