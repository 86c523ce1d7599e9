"""What one step costs the scheduling core: milliseconds of one thread, by the requests that run.

Planning a step and taking its result, for a pipeline of four stages that decodes without end; a
quarter of the running requests is in each step. Nothing is sent anywhere. Beside it the same with
prompts that come and go.

    python -m benchmarks.core_step
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import deque
from itertools import count

from benchmarks.virtual.load import Arrival, request_of
from scheduler.core import Finished, PipelineFacts, SchedulerCore, SchedulerLimits
from stagemesh.plan import Epoch, HopTiming, Row, RowResult, SampledToken, Step, StepResult

NUM_STAGES = 4
_LONG = 1_000_000  # tokens of output that nobody gets to the end of


class Engine:
    """A core with so many requests running, and steps under way that are answered when asked."""

    def __init__(self, num_running: int, num_output: int, num_prompt: int) -> None:
        limits = SchedulerLimits(
            max_running_requests=num_running, max_waiting_requests=10 * num_running
        )
        self.core = SchedulerCore(limits)
        self.core.add_pipeline(_facts(), 0)
        self.in_flight: deque[Step] = deque()
        self._numbers = count()
        self._arrival = Arrival(0, num_prompt, num_output)
        self._now_ns = 0
        for _ in range(num_running):
            self.submit()

    def submit(self) -> None:
        self.core.submit(request_of(next(self._numbers), self._arrival), self._now_ns)

    def turn(self) -> int:
        """A result comes and a step goes; returns how many nanoseconds the core took."""
        result = _result(self.in_flight.popleft()) if self.in_flight else None
        self._now_ns += 10_000_000
        start_ns = time.thread_time_ns()
        if result is not None:
            self.core.on_result(result, self._now_ns)
        steps = self.core.schedule(self._now_ns)
        events = self.core.take_events()
        took_ns = time.thread_time_ns() - start_ns
        self.in_flight += steps
        for event in events:
            if isinstance(event, Finished):
                self.submit()
        return took_ns


def _facts() -> PipelineFacts:
    return PipelineFacts("p", Epoch(1, 1), NUM_STAGES, 200_000, 16, 2 * _LONG, "model")


def _result(step: Step) -> StepResult:
    timings = tuple(
        HopTiming(stage, compute_ns=8_500_000 + 10_000 * step.num_tokens)
        for stage in range(NUM_STAGES)
    )
    rows = tuple(map(_sampled, step.rows))
    return StepResult(step.pipeline_id, step.epoch, step.step, rows, timings)


def _sampled(row: Row) -> RowResult:
    tokens = tuple(SampledToken(position + 1, 7) for position in row.sample_positions)
    return RowResult(row.sequence_id, row.run, tokens)


def measure(num_running: int, num_output: int, num_turns: int) -> tuple[float, float, float, float]:
    """(median ms, p99 ms, mean rows, microseconds per row) of the turns after a warm-up."""
    engine = Engine(num_running, num_output, 64)
    for _ in range(4 * num_running // 8 + 200):
        engine.turn()
    gc.collect()
    times_ns, num_rows = [], 0
    for _ in range(num_turns):
        num_rows += len(engine.in_flight[0].rows)
        times_ns.append(engine.turn())
    median_ms = statistics.median(times_ns) / 1e6
    p99_ms = sorted(times_ns)[int(0.99 * num_turns)] / 1e6
    mean_rows = num_rows / num_turns
    return median_ms, p99_ms, mean_rows, 1000 * median_ms / mean_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024])
    parser.add_argument("--turns", type=int, default=500)
    args = parser.parse_args()
    print("| load | running | rows per step | ms per step | p99 | us per row |")
    print("|" + "---|" * 6)
    for load, num_output in (("decode", _LONG), ("outputs of 64", 64)):
        for num_running in args.running:
            median_ms, p99_ms, rows, per_row_us = measure(num_running, num_output, args.turns)
            cells = (f"{rows:.0f}", f"{median_ms:.2f}", f"{p99_ms:.2f}", f"{per_row_us:.1f}")
            print(f"| {load} | {num_running} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
