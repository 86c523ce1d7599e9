"""Options of `stagemesh bench`: on what, which loads, what comes out."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from stagemesh.addresses import split_address
from stagemesh.bench.summary import Objective
from stagemesh.bench.workload import Lengths, Load, LoadKind, positive_numbers, whole_numbers
from stagemesh.cli.up_options import UpOptions
from stagemesh.errors import ConfigError
from stagemesh.option_values import Kind
from stagemesh.options import check_options, option, options_of, parse_options

DEFAULT_CONCURRENCY = (1, 8, 32)
DEFAULT_NUM_REQUESTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """A running server, or meshes of our own, one after another."""

    gateway: str = option("", help="measure the mesh with this gateway, host:port, by gRPC")
    url: str = option("", help="measure this OpenAI-compatible server, http://host:port/v1")
    scheduler: str = option(
        "", help="of a running mesh: its scheduler, host:port, for what its stages did"
    )
    served_model: str = option("", help="of --url: name of the model, where it serves several")
    endpoint: str = option(
        "completions", help="of --url: which to use", choices=("completions", "chat")
    )
    api_key: str = option("none", help="of --url")
    model: Path | None = option(None, help="of own meshes: directory of the model [the demo model]")
    stages: tuple[str, ...] = option((), help="of own meshes: pipeline stages, such as 1,2,4 [2]")
    threads: tuple[str, ...] = option(
        (), help="of own meshes: threads of each stage, such as 1,2 [the cores, shared out]"
    )
    up: str = option(
        "", help='of own meshes: further options of stagemesh up, such as "--dtype bfloat16"'
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.gateway and self.url:
            raise ConfigError("--gateway and --url are two servers: take one of them")
        for name in ("gateway", "scheduler"):
            if getattr(self, name):
                split_address(getattr(self, name))
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--url must begin with http:// or https://, not {self.url!r}")
        if self.is_running and (self.up or self.model or self.stages or self.threads):
            raise ConfigError(
                "--up, --model, --stages and --threads are of own meshes, not of a running one"
            )
        if not self.is_running and self.scheduler:
            raise ConfigError("--scheduler is of a running mesh: --gateway or --url names it")
        whole_numbers("--stages", self.stages)
        whole_numbers("--threads", self.threads)

    @property
    def is_running(self) -> bool:
        return bool(self.gateway or self.url)

    def meshes(self) -> list[UpOptions]:
        """Own meshes to measure, in order."""
        # What the environment says to `bench` of the same name is no word to `up`.
        own = {each.variable for each in options_of(TargetOptions)}
        environ = {name: value for name, value in os.environ.items() if name not in own}
        base = parse_options(
            UpOptions, shlex.split(self.up), prog="stagemesh bench --up", environ=environ, role="up"
        )
        base = replace(
            base,
            model=self.model or base.model,
            grpc_port=0,
            http_port=0,
            scheduler_port=0,
            log_level=base.log_level or "error",
        )
        threads: tuple[int | None, ...] = whole_numbers("--threads", self.threads) or (
            base.threads_per_stage,
        )
        return [
            replace(base, stages=stages, threads_per_stage=each)
            for stages in whole_numbers("--stages", self.stages) or (base.stages,)
            for each in threads
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    batch: tuple[str, ...] = option((), help="so many requests at once, and no more: 1,8,32")
    concurrency: tuple[str, ...] = option(
        (), help="closed loop: so many under way at any time [1,8,32 where no load is given]"
    )
    rate: tuple[str, ...] = option((), help="open loop: Poisson arrivals, so many a second: 0.5,2")
    trace: Path | None = option(
        None,
        help="open loop of a trace's arrivals and lengths, Azure's CSV or Mooncake's JSON lines; "
        "with --concurrency a closed loop of its lengths",
    )
    rate_scale: tuple[str, ...] = option(
        ("1",), help="of a trace: its rate multiplied, such as 0.5,1,2"
    )
    length_scale: float = option(1.0, help="of a trace: its lengths multiplied", minimum=1e-6)
    max_requests: int | None = option(None, help="of a trace: its first ones only", minimum=1)
    num_requests: int | None = option(
        None, help="of each run [4 per place of a closed loop, 100 of an open one]", minimum=1
    )
    prompt_tokens: tuple[str, ...] = option(
        ("128",), help="lengths of prompts: 128,512, or drawn evenly from 64-256"
    )
    output_tokens: tuple[str, ...] = option(("128",), help="lengths of outputs, the same way")
    warm_up: int | None = option(
        None,
        help="requests before each run that do not count [as many as run at a time, 32 at most]",
        minimum=0,
    )
    cancel_share: float = option(
        0.0, help="share of the requests that is given up in mid-stream", minimum=0, maximum=1
    )
    temperature: float = option(0.0, help="0 is greedy", minimum=0)
    timeout_s: float = option(
        600.0, help="a request that takes longer has failed", kind=Kind.DURATION, minimum=0.001
    )
    seed: int | None = option(
        None,
        help="decides lengths, prompts and arrivals [drawn: a server that has seen the prompts "
        "would answer from its prefix cache]",
        minimum=0,
    )

    def __post_init__(self) -> None:
        check_options(self)
        self.loads()
        self.prompts()
        self.outputs()
        if self.trace is None and (self.max_requests is not None or self.length_scale != 1.0):
            raise ConfigError("--max-requests and --length-scale need a --trace")
        if self.trace is not None and (self.batch or self.rate):
            raise ConfigError("--trace has its own arrivals: no --batch or --rate beside it")

    def loads(self) -> list[Load]:
        found = [
            Load(kind, level)
            for kind, name, texts in (
                (LoadKind.BATCH, "--batch", self.batch),
                (LoadKind.CONCURRENCY, "--concurrency", self.concurrency),
            )
            for level in whole_numbers(name, texts)
        ]
        found += [Load(LoadKind.RATE, level) for level in positive_numbers("--rate", self.rate)]
        if not found and self.trace is not None:
            scales = positive_numbers("--rate-scale", self.rate_scale)
            return [Load(LoadKind.TRACE, scale) for scale in scales]
        return found or [Load(LoadKind.CONCURRENCY, level) for level in DEFAULT_CONCURRENCY]

    def prompts(self) -> list[Lengths]:
        return _lengths("--prompt-tokens", self.prompt_tokens)

    def outputs(self) -> list[Lengths]:
        return _lengths("--output-tokens", self.output_tokens)

    def num_for(self, load: Load) -> int:
        """Requests of a run whose load says nothing of that itself."""
        if load.kind is LoadKind.BATCH:
            return int(load.level)
        if self.num_requests is not None:
            return self.num_requests
        return max(8, 4 * int(load.level)) if not load.is_open else DEFAULT_NUM_REQUESTS

    def num_warm_up(self, load: Load) -> int:
        if self.warm_up is not None:
            return self.warm_up
        return 4 if load.is_open else min(32, int(load.level))


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    rounds: int = option(
        1, help="all of it so many times, meshes in turn; medians are shown", minimum=1
    )
    slo_ttft_s: float | None = option(
        None, help="goodput: time to the first token at most, such as 500ms", kind=Kind.DURATION
    )
    slo_tpot_s: float | None = option(
        None, help="goodput: time per token after it at most", kind=Kind.DURATION
    )
    slo_e2e_s: float | None = option(
        None, help="goodput: time of the whole request at most", kind=Kind.DURATION
    )
    json: bool = option(False, help="print JSON instead of tables, for programs")
    out: Path | None = option(
        None, help="directory for results.json, plots as PNG, and report.html with all of it"
    )
    plots: bool = option(True, help="of --out: draw them, which needs matplotlib")

    def __post_init__(self) -> None:
        check_options(self)

    def objective(self) -> Objective:
        return Objective(self.slo_ttft_s, self.slo_tpot_s, self.slo_e2e_s)


def _lengths(name: str, texts: tuple[str, ...]) -> list[Lengths]:
    try:
        return [Lengths.read(text) for text in texts]
    except ValueError as error:
        raise ConfigError(f"{name} {error}") from None
