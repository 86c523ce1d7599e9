"""`stagemesh bench`: how fast a server is, a running one or meshes that it starts itself."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from stagemesh.bench import machine
from stagemesh.bench.client import Client
from stagemesh.bench.grpc_client import grpc_client
from stagemesh.bench.http_client import HttpClient, http_client
from stagemesh.bench.meter import meter
from stagemesh.bench.options import LoadOptions, OutputOptions, TargetOptions
from stagemesh.bench.page import page
from stagemesh.bench.plots import draw_all, require_matplotlib
from stagemesh.bench.progress import ProgressView
from stagemesh.bench.results import MeshStart, Results
from stagemesh.bench.sweep import Sweep, Target
from stagemesh.bench.tables import tables
from stagemesh.cli.mesh_facts import Endpoints
from stagemesh.cli.up import check_model, run_mesh
from stagemesh.cli.up_options import UpOptions
from stagemesh.errors import ConfigError
from stagemesh.options import parse_groups
from stagemesh.process import write_whole


def run(argv: Sequence[str]) -> int:
    target, load, output = parse_groups(
        (TargetOptions, LoadOptions, OutputOptions),
        argv,
        prog="stagemesh bench",
        description="Measures a running server (--gateway, --url), or meshes that it starts "
        "itself: closed and open loops, over batch sizes, rates, lengths, stages and threads.",
    )
    if output.out is not None and output.plots:
        require_matplotlib()
    bench = _Bench(target, load, output, argv)
    try:
        bench.measure()
    except KeyboardInterrupt:
        bench.results.interrupted = True
        raise
    finally:
        # What was found before it went wrong has taken long enough to find.
        if bench.results.reports:
            bench.write()
    return 1 if any(report.num_failed for report in bench.results.reports) else 0


class _Bench:
    """One call of the command: `measure`, then `write`."""

    def __init__(
        self,
        target: TargetOptions,
        load: LoadOptions,
        output: OutputOptions,
        argv: Sequence[str],
    ) -> None:
        self._target = target
        self._load = load
        self._output = output
        self._view = ProgressView()
        self._sweep = Sweep(load, output.objective(), self._view)
        self.results = Results(
            machine=machine.facts(["stagemesh", "bench", *argv]),
            target=target.url or target.gateway or "own meshes",
            seed=self._sweep.seed,
            objective=dataclasses.asdict(output.objective()),
            temperature=load.temperature,
        )
        print(f"seed {self._sweep.seed}", file=sys.stderr)

    def measure(self) -> None:
        meshes = [] if self._target.is_running else self._target.meshes()
        for mesh in meshes:
            check_model(mesh)
        for number in range(1, self._output.rounds + 1):
            if self._target.is_running:
                asyncio.run(self._measure_running(number))
            for mesh in meshes:
                self._measure_own(mesh, number)

    async def _measure_running(self, number: int) -> None:
        async with self._connected(self._target.gateway, self._target.scheduler) as target:
            await self._measure(target, number)

    def _measure_own(self, options: UpOptions, number: int) -> None:
        """Raises KeyboardInterrupt where the mesh was told to stop."""
        done = False
        started_s = time.monotonic()

        async def while_serving(endpoints: Endpoints) -> None:
            nonlocal done
            startup_s = time.monotonic() - started_s
            threads = options.threads()
            self.results.starts.append(MeshStart(options.stages, threads, number, startup_s))
            async with self._connected(endpoints.grpc, endpoints.scheduler) as target:
                own = dataclasses.replace(target, stages=options.stages, threads=threads)
                await self._measure(own, number)
            done = True

        run_mesh(options, while_serving)
        if not done:
            raise KeyboardInterrupt

    async def _measure(self, target: Target, number: int) -> None:
        self.results.model = target.client.served.model
        async for report in self._sweep.measure(target, number):
            self.results.reports.append(report)

    @asynccontextmanager
    async def _connected(self, gateway: str, scheduler: str) -> AsyncIterator[Target]:
        async with AsyncExitStack() as stack:
            # First: what it sees before anything is sent is what it counts from.
            asked = await stack.enter_async_context(meter(scheduler)) if scheduler else None
            client: Client
            if gateway:
                client = await stack.enter_async_context(
                    grpc_client(
                        gateway,
                        temperature=self._load.temperature,
                        timeout_s=self._load.timeout_s,
                    )
                )
            else:
                client = await stack.enter_async_context(self._http_client())
            yield Target(client, asked)

    def _http_client(self) -> AbstractAsyncContextManager[HttpClient]:
        return http_client(
            self._target.url,
            model=self._target.served_model,
            chat=self._target.endpoint == "chat",
            api_key=self._target.api_key,
            temperature=self._load.temperature,
            timeout_s=self._load.timeout_s,
        )

    # ---- what comes out ------------------------------------------------------------------------

    def write(self) -> None:
        results, out = self.results, self._output.out
        results.notes = self._view.notes
        if out is not None:
            _write_files(results, self._output)
        if self._output.json:
            print(results.as_json(), end="")
            return
        for title, table in tables(results).items():
            print(f"\n{title}\n\n{table}")
        if out is not None:
            print(f"\nwritten to {out}")


def _write_files(results: Results, output: OutputOptions) -> None:
    out = output.out
    assert out is not None
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "results.json", results.as_json())
        plots = draw_all(results.reports) if output.plots else {}
        for name, data in plots.items():
            (out / name).write_bytes(data)
        write_whole(out / "report.html", page(results, plots))
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from None
