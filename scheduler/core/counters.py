"""Totals since the core began, and the rates of the last seconds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from scheduler.core.events import EndReason

_WINDOW_NS = 5_000_000_000
_NUM_RECENT_ENDS = 64
_MIN_RETRY_S = 0.1
_MAX_RETRY_S = 30.0


class RateMeter:
    """Tokens per second over the last five seconds, from sums of a tenth of a second each."""

    _BUCKET_NS = 100_000_000

    def __init__(self) -> None:
        self._buckets: deque[tuple[int, int]] = deque()

    def add(self, count: int, now_ns: int) -> None:
        bucket = now_ns // self._BUCKET_NS
        if self._buckets and self._buckets[-1][0] == bucket:
            count += self._buckets.pop()[1]
        self._buckets.append((bucket, count))
        self._drop_old(now_ns)

    def per_second(self, now_ns: int) -> float:
        self._drop_old(now_ns)
        return sum(count for _, count in self._buckets) * 1e9 / _WINDOW_NS

    def _drop_old(self, now_ns: int) -> None:
        oldest = (now_ns - _WINDOW_NS) // self._BUCKET_NS
        while self._buckets and self._buckets[0][0] <= oldest:
            self._buckets.popleft()


@dataclass(slots=True)
class Counters:
    num_accepted: int = 0
    num_finished: int = 0
    num_refused: int = 0
    num_aborted: int = 0
    num_failed: int = 0
    num_preempted: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_rate: RateMeter = field(default_factory=RateMeter)
    prompt_rate: RateMeter = field(default_factory=RateMeter)
    _recent_ends_ns: deque[int] = field(default_factory=lambda: deque(maxlen=_NUM_RECENT_ENDS))

    def request_ended(self, reason: EndReason, now_ns: int) -> None:
        self._recent_ends_ns.append(now_ns)
        if reason is EndReason.ABORTED:
            self.num_aborted += 1
        elif reason is EndReason.ERROR:
            self.num_failed += 1
        else:
            self.num_finished += 1

    def prompt_admitted(self, num_tokens: int, num_cached_tokens: int, now_ns: int) -> None:
        self.prompt_tokens += num_tokens
        self.cached_prompt_tokens += num_cached_tokens
        self.prompt_rate.add(num_tokens, now_ns)

    def tokens_generated(self, num_tokens: int, now_ns: int) -> None:
        self.generated_tokens += num_tokens
        self.generated_rate.add(num_tokens, now_ns)

    def retry_after_s(self, num_waiting: int, now_ns: int) -> float:
        """When half of the queue will be gone, if requests go on ending as they did lately."""
        if len(self._recent_ends_ns) < 2:
            return 1.0
        elapsed_s = (now_ns - self._recent_ends_ns[0]) / 1e9
        seconds_each = elapsed_s / len(self._recent_ends_ns)
        return min(max(num_waiting / 2 * seconds_each, _MIN_RETRY_S), _MAX_RETRY_S)
