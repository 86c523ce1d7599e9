"""Options of `stagemesh up` and what they mean for each process of the mesh."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from stagemesh.demo import demo_model_dir
from stagemesh.errors import ConfigError
from stagemesh.logs import LEVELS
from stagemesh.option_values import Kind
from stagemesh.options import check_options, option
from stagemesh.process import LOG_FORMATS


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """None where a process's own default, or its part of the file, decides."""

    model: Path | None = option(None, help="directory of the model [the demo model]")
    stages: int = option(2, help="pipeline stages", minimum=1, maximum=1024)
    replicas: int = option(1, help="pipelines, each of its own workers", minimum=1, maximum=1024)
    spares: int = option(
        0, help="idle workers that take the place of one that is lost", minimum=0, maximum=1024
    )
    restart: bool = option(False, help="start whatever dies again, at the same address")
    device: str | None = option(None, help="device of the workers: cpu, cuda, cuda:0")
    dtype: str | None = option(
        None, help="type to compute in", choices=("auto", "float32", "bfloat16", "float16")
    )
    wire_dtype: str | None = option(
        None,
        help="type in which hidden states travel from stage to stage",
        choices=("auto", "float32", "bfloat16", "int8"),
    )
    kv_dtype: str | None = option(
        None,
        help="type in which keys and values are held (docs/quantisation.md)",
        choices=("auto", "float32", "bfloat16", "float16", "int8"),
    )
    quantization: str | None = option(
        None, help="how weights are held: auto, none, int8, int4-g64, … (docs/quantisation.md)"
    )
    adapters: tuple[str, ...] = option(
        (),
        flag="adapter",
        help="LoRA adapters as NAME=DIR, more than one with commas or by repeating this; requests "
        "choose one as their model (docs/adapters.md)",
    )
    threads_per_stage: int | None = option(
        None, help="threads of each worker [the cores, shared out]", minimum=1, maximum=1024
    )
    lone_threads: int | None = option(
        None,
        help="threads of each worker for a step that has the pipeline to itself [all cores where "
        "--threads-per-stage says nothing; not with --batch-invariant]",
        minimum=1,
        maximum=1024,
    )
    max_kv_memory_bytes: int | None = option(
        None, help="memory of each worker for KV, such as 2GiB", kind=Kind.SIZE, minimum=1
    )
    num_blocks: int | None = option(
        None, help="blocks of KV of each worker, instead of --max-kv-memory", minimum=1
    )
    batch_invariant: bool | None = option(
        None, help="results do not depend on what else is in the batch, bit for bit"
    )
    block_size_tokens: int | None = option(
        None, help="tokens in a block of KV", flag="block-size", minimum=1, maximum=4096
    )
    max_step_tokens: int | None = option(None, help="tokens in a step at most", minimum=1)
    max_chunk_tokens: int | None = option(
        None, help="tokens of one request in a step at most", minimum=1
    )
    host: str = option("127.0.0.1", help="address to listen on, of gateway and scheduler")
    grpc_port: int = option(50051, help="0 for a free one", minimum=0, maximum=65535)
    http_port: int = option(8000, help="0 for a free one", minimum=0, maximum=65535)
    scheduler_port: int = option(50050, help="0 for a free one", minimum=0, maximum=65535)
    ready_file: Path | None = option(
        None, help="file to write, whole, when the mesh serves: JSON with addresses and processes"
    )
    drain_timeout_s: float = option(
        10.0, help="how long requests may go on after Ctrl-C", kind=Kind.DURATION, maximum=3600
    )
    log_dir: Path | None = option(None, help="directory for the whole log of each process")
    log_level: str | None = option(
        None,
        help="least severe level that is shown [warning on a terminal, else info]",
        choices=LEVELS,
    )
    log_format: str = option(
        "auto", help="auto: console on a terminal, else json", choices=tuple(LOG_FORMATS)
    )
    config: Path | None = option(None, help="TOML file with options of all processes")

    def __post_init__(self) -> None:
        check_options(self)
        ports = [port for port in (self.grpc_port, self.http_port, self.scheduler_port) if port]
        if len(set(ports)) < len(ports):
            raise ConfigError("--grpc-port, --http-port and --scheduler-port must differ")

    @property
    def num_stage_workers(self) -> int:
        """Those that the mesh needs to be whole."""
        return self.stages * self.replicas

    @property
    def num_workers(self) -> int:
        return self.num_stage_workers + self.spares

    def model_dir(self) -> Path:
        """Raises ConfigError where there is no model."""
        if self.model is None:
            return demo_model_dir()
        if not (self.model / "config.json").is_file():
            raise ConfigError(f"--model {self.model}: no model there (a config.json is wanted)")
        return self.model.resolve()

    def threads(self) -> int:
        """Threads of each worker: as many as were asked for, or this host's cores shared out."""
        if self.threads_per_stage is not None:
            return self.threads_per_stage
        return _asked_threads() or max(1, num_cores() // self.num_stage_workers)

    def threads_when_alone(self) -> int:
        """Threads of a worker's step while the other stages of its pipeline are idle; 0: as many
        as otherwise. Sums differ in their last bits by the number of threads."""
        if self.lone_threads is not None:
            return self.lone_threads
        is_told = self.threads_per_stage is not None or _asked_threads() > 0
        if is_told or self.batch_invariant:
            return 0
        return max(1, num_cores() // self.replicas)


def _asked_threads() -> int:
    """What the environment says of any program's threads; 0 where it says nothing."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() else 0


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
