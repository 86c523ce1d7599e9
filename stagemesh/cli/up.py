"""`stagemesh up`: a whole mesh on this host, until Ctrl-C."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from stagemesh.adapters import parse_adapters
from stagemesh.cli.client import GATEWAY, SCHEDULER
from stagemesh.cli.local_mesh import LocalMesh
from stagemesh.cli.mesh_facts import Endpoints
from stagemesh.cli.up_options import UpOptions
from stagemesh.cli.up_view import UpView
from stagemesh.cli.worker import require_worker_extra
from stagemesh.errors import ConfigError
from stagemesh.logs import configure_logging
from stagemesh.model_spec import ModelSpec
from stagemesh.options import parse_options
from stagemesh.process import LOG_FORMATS, write_whole

WhileServing = Callable[[Endpoints], Awaitable[None]]


def run(argv: Sequence[str]) -> int:
    options = parse_options(
        UpOptions,
        argv,
        prog="stagemesh up",
        description="Starts a whole mesh on this host: scheduler, gateway and stage workers.",
    )

    async def until_stopped(endpoints: Endpoints) -> None:
        print(_welcome(options, endpoints), flush=True)
        await asyncio.Event().wait()

    return run_mesh(options, until_stopped)


def run_mesh(options: UpOptions, while_serving: WhileServing) -> int:
    """A mesh for as long as `while_serving` takes, or until SIGINT or SIGTERM.

    Raises StageMeshError when the mesh cannot be formed or does not last.
    """
    check_model(options)
    _prepare_directories(options)
    configure_logging("up", json=LOG_FORMATS[options.log_format], level=options.log_level or "info")
    asyncio.run(_run(options, while_serving))
    return 0


def check_model(options: UpOptions) -> None:
    """Raises at once what a worker would only find out after it has started."""
    require_worker_extra()
    model_dir = options.model_dir()
    spec = ModelSpec.from_directory(model_dir)
    parse_adapters(options.adapters, model_dir.name)
    if options.stages > spec.num_layers:
        raise ConfigError(
            f"--stages {options.stages}: the model has {spec.num_layers} layers, "
            "a stage needs one at least"
        )


async def _run(options: UpOptions, while_serving: WhileServing) -> None:
    view = UpView(options)
    mesh = LocalMesh(options, view)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, mesh.stop)

    async def serving(endpoints: Endpoints) -> None:
        view.end_progress()
        _write_ready(options.ready_file, endpoints)
        view.after_restart = lambda: _write_ready(options.ready_file, mesh.with_pids(endpoints))
        await while_serving(endpoints)

    view.begin()
    try:
        await mesh.run(serving)
    finally:
        view.end_progress()
        _forget(options.ready_file)


def _prepare_directories(options: UpOptions) -> None:
    _forget(options.ready_file)
    if options.log_dir is not None:
        options.log_dir.mkdir(parents=True, exist_ok=True)


def _forget(ready_file: Path | None) -> None:
    """A ready file says that the mesh serves, so it may not outlive it."""
    if ready_file is not None:
        ready_file.unlink(missing_ok=True)


def _write_ready(ready_file: Path | None, endpoints: Endpoints) -> None:
    if ready_file is not None:
        write_whole(ready_file, json.dumps(dataclasses.asdict(endpoints), indent=2) + "\n")


def _welcome(options: UpOptions, endpoints: Endpoints) -> str:
    stages = "1 stage" if options.stages == 1 else f"{options.stages} stages"
    replicas = "" if options.replicas == 1 else f", {options.replicas} replicas"
    spares = "" if not options.spares else f", {options.spares} to spare"
    target = "" if endpoints.grpc == GATEWAY else f" --target {endpoints.grpc}"
    scheduler = "" if endpoints.scheduler == SCHEDULER else f" --scheduler {endpoints.scheduler}"
    return "\n".join(
        [
            "",
            f"StageMesh serves {options.model_dir().name} in {stages}{replicas}{spares}.",
            f"  gRPC       {endpoints.grpc}",
            f"  HTTP       http://{endpoints.http}/v1",
            f"  scheduler  {endpoints.scheduler}",
            *endpoints.worker_lines(),
            "",
            f'Try        stagemesh generate "Once upon a time"{target}',
            f"Watch it   stagemesh status --watch{scheduler}",
            "Stop it    Ctrl-C",
            "",
        ]
    )
