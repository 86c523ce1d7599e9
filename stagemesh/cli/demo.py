"""`stagemesh demo`: a mesh of two stages, a story from it, and a clean end. One command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from stagemesh.cli.client import connection
from stagemesh.cli.generate import stream_text, write_text
from stagemesh.cli.mesh_facts import Endpoints
from stagemesh.cli.sampling_options import SamplingOptions
from stagemesh.cli.up import run_mesh
from stagemesh.cli.up_options import UpOptions
from stagemesh.options import check_options, option, parse_options


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    text: str = option("Once upon a time", help="how the story begins", positional=True)
    stages: int = option(2, help="pipeline stages", minimum=1)
    max_tokens: int = option(200, help="length of the story", minimum=1)
    seed: int = option(7, help="another seed tells another story", minimum=0)

    def __post_init__(self) -> None:
        check_options(self)


def run(argv: Sequence[str]) -> int:
    options = parse_options(
        DemoOptions,
        argv,
        prog="stagemesh demo",
        description="Starts a mesh with the demo model, lets it tell a story, and stops it.",
    )

    async def tell(endpoints: Endpoints) -> None:
        _introduce(endpoints)
        await _tell_story(options, endpoints.grpc)

    free_ports = UpOptions(stages=options.stages, grpc_port=0, http_port=0, scheduler_port=0)
    return run_mesh(free_ports, tell)


def _introduce(endpoints: Endpoints) -> None:
    print("\nStageMesh serves; the story goes through these processes:", file=sys.stderr)
    print(*endpoints.worker_lines(), "", sep="\n", file=sys.stderr)


async def _tell_story(options: DemoOptions, target: str) -> None:
    sampling = SamplingOptions(
        target=target, max_tokens=options.max_tokens, seed=options.seed, temperature=0.7
    )
    request = sampling.request()
    request.text = options.text
    write_text(options.text)
    async with connection(target, "gateway") as channel:
        stats = await stream_text(channel, request, write_text)
    write_text("\n\n")
    print(stats, file=sys.stderr)
