"""What whoever runs a benchmark sees meanwhile: a bar on a terminal, a line per run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stagemesh.bench.drive import Watch
from stagemesh.bench.report import Report, Setting
from stagemesh.bench.samples import Sample


class ProgressView:
    """To standard error: standard output is for results."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self.notes: list[str] = []

    @contextmanager
    def run(self, setting: Setting, num_requests: int) -> Iterator[Watch]:
        progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            # A client that draws has less time to measure.
            refresh_per_second=2,
            transient=True,
            disable=not self._console.is_terminal,
        )
        with progress:
            yield _Bar(progress, str(setting), num_requests)

    def on_report(self, report: Report) -> None:
        ttft = report.ttft_ms
        first = "" if ttft is None else f", TTFT p50 {ttft.p50:.0f} ms"
        failed = f", {report.num_failed} FAILED" if report.num_failed else ""
        self._say(
            f"{report.setting}: {report.num_whole} of {report.num_requests} requests in "
            f"{report.duration_s:.1f} s, {report.output_tokens_per_s:.1f} tokens/s{first}{failed}"
        )
        for error, count in report.errors.items():
            self._say(f"  {count} x {error}")

    def note(self, text: str) -> None:
        """Once, however often it is said."""
        if text not in self.notes:
            self.notes.append(text)
            self._say(f"note: {text}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


class _Bar:
    """A run's bar and what its streams bring together."""

    def __init__(self, progress: Progress, description: str, num_requests: int) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=num_requests, speed="")
        self._under_way = self._failed = 0
        self._tokens = 0.0
        self._start_s = time.monotonic()

    def on_sent(self) -> None:
        self._under_way += 1
        self._show(0)

    def on_tokens(self, num: float) -> None:
        self._tokens += num

    def on_ended(self, sample: Sample) -> None:
        self._under_way -= 1
        self._failed += sample.error is not None
        self._show(1)

    def _show(self, advance: int) -> None:
        passed_s = max(1e-3, time.monotonic() - self._start_s)
        failed = f", {self._failed} failed" if self._failed else ""
        speed = f"{self._under_way} under way, {self._tokens / passed_s:.0f} tokens/s{failed}"
        self._progress.update(self._task, advance=advance, speed=speed)
