"""Runs every load of a sweep on one target and makes a report of each.

Knows no server: a target is a client and, where its scheduler can be asked, a meter.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from stagemesh.bench.client import Client
from stagemesh.bench.drive import Outcome, Unwatched, Watch, closed_loop, open_loop
from stagemesh.bench.meter import Looks, Meter
from stagemesh.bench.options import LoadOptions
from stagemesh.bench.report import MeshView, Report, Setting, make_report
from stagemesh.bench.summary import Objective
from stagemesh.bench.traces import TraceEntry, read_trace
from stagemesh.bench.workload import (
    Ask,
    Lengths,
    Load,
    LoadKind,
    drawn_asks,
    poisson_arrivals_s,
    replayed_arrivals_s,
    trace_asks,
    with_cancels,
)
from stagemesh.errors import ConfigError

WARM_UP_OUTPUT_TOKENS = 16


class SweepView(Protocol):
    """Who is told which run begins, what it does, and how it went."""

    def run(self, setting: Setting, num_requests: int) -> AbstractContextManager[Watch]: ...
    def on_report(self, report: Report) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Target:
    """`stages` and `threads` of an own mesh."""

    client: Client
    meter: Meter | None = None
    stages: int | None = None
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One cell: what is sent and when. `arrivals_s` None: a closed loop."""

    setting: Setting
    asks: Sequence[Ask]
    warm_up: Sequence[Ask]
    arrivals_s: Sequence[float] | None
    num_left_out: int = 0


class Sweep:
    """All cells of one choice of options, on as many targets as are given to `measure`."""

    def __init__(self, options: LoadOptions, objective: Objective, view: SweepView) -> None:
        self.seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
        self._options = options
        self._objective = objective
        self._view = view
        self._trace: list[TraceEntry] = []
        if options.trace is not None:
            self._trace = read_trace(options.trace, options.max_requests)

    async def measure(self, target: Target, round_number: int) -> AsyncIterator[Report]:
        """Each run's report as it comes.

        Another round has other prompts, another target in the same round the same.
        """
        for note in target.client.served.notes:
            self._view.note(note)
        for run in self.runs(target, round_number):
            report = await self._measured(target, run, round_number)
            self._view.on_report(report)
            yield report

    def runs(self, target: Target, round_number: int) -> Iterator[Run]:
        """Raises ConfigError where nothing is left to send."""
        for index, (prompt, output, load) in enumerate(self._cells()):
            run = self._run(target, prompt, output, load, f"{self.seed} {round_number} {index}")
            if run.num_left_out:
                self._view.note(
                    f"{run.num_left_out} of the trace's {len(self._trace)} requests are longer "
                    f"than the server's context of {target.client.served.max_tokens}: left out"
                )
            if not run.asks:
                raise ConfigError("no request of the trace fits: --length-scale makes them shorter")
            yield run

    def _cells(self) -> Iterator[tuple[Lengths | None, Lengths | None, Load]]:
        if self._trace:
            for load in self._options.loads():
                yield None, None, load
            return
        for prompt in self._options.prompts():
            for output in self._options.outputs():
                for load in self._options.loads():
                    yield prompt, output, load

    def _run(
        self, target: Target, prompt: Lengths | None, output: Lengths | None, load: Load, seed: str
    ) -> Run:
        options, num_left_out = self._options, 0
        arrivals_s: list[float] | None = None
        if prompt is None or output is None:
            max_tokens = target.client.served.max_tokens
            asks, traced_s, num_left_out = trace_asks(
                self._trace, seed, length_scale=options.length_scale, max_tokens=max_tokens
            )
            arrivals_s = replayed_arrivals_s(traced_s, load.level)
        else:
            asks = drawn_asks(options.num_for(load), prompt, output, seed)
        if load.kind is LoadKind.RATE:
            arrivals_s = poisson_arrivals_s(load.level, len(asks), f"{seed} arrivals")
        return Run(
            setting=Setting(
                load=load,
                prompt=str(prompt or "trace"),
                output=str(output or "trace"),
                stages=target.stages,
                threads=target.threads,
            ),
            asks=with_cancels(asks, options.cancel_share, f"{seed} cancels"),
            warm_up=_warm_up(asks, options.num_warm_up(load), f"{seed} warm-up"),
            arrivals_s=arrivals_s if load.is_open else None,
            num_left_out=num_left_out,
        )

    async def _measured(self, target: Target, run: Run, round_number: int) -> Report:
        client = target.client
        if run.warm_up:
            await closed_loop(client, run.warm_up, len(run.warm_up), Unwatched())
        watching = target.meter.watching() if target.meter else nullcontext()
        async with watching as looks:
            with self._view.run(run.setting, len(run.asks)) as watch:
                outcome = await _driven(client, run, watch)
        return make_report(
            run.setting,
            outcome.samples,
            client_cpu_s=outcome.client_cpu_s,
            objective=self._objective,
            mesh=_mesh_view(looks),
            round_number=round_number,
        )


async def _driven(client: Client, run: Run, watch: Watch) -> Outcome:
    if run.arrivals_s is not None:
        return await open_loop(client, run.asks, run.arrivals_s, watch)
    return await closed_loop(client, run.asks, int(run.setting.load.level), watch)


def _mesh_view(looks: Looks | None) -> MeshView | None:
    if looks is None:
        return None
    return MeshView(looks.usage(), looks.num_workers(), looks.lone_step_ms())


def _warm_up(asks: Sequence[Ask], num: int, seed: str) -> list[Ask]:
    """As long prompts as the run's first ones, with other content, and short outputs."""
    rng = random.Random(seed)
    return [
        Ask(ask.prompt_tokens, min(ask.output_tokens, WARM_UP_OUTPUT_TOKENS), rng.getrandbits(32))
        for ask in asks[:num]
    ]
