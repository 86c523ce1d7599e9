"""Options of `stagemesh up` and what they mean for each process of the mesh."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from stagemesh.cli.stage_ranks import ranks_of_stages
from stagemesh.cores import num_cores
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
    tensor_parallel: tuple[str, ...] = option(
        (),
        help="ranks that share the layers of each worker, or one number per stage: 2 or 2,1,1 [1]",
    )
    expert_parallel: bool | None = option(
        None, help="these ranks have whole experts of a mixture instead of a part of each"
    )
    redundant_experts: int | None = option(
        None,
        help="experts that each rank has beyond its share: those that the routers favour",
        minimum=0,
        maximum=1024,
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
        self.ranks()
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

    def ranks(self) -> tuple[int, ...]:
        """Of each stage's workers. Raises ConfigError."""
        return ranks_of_stages(self.tensor_parallel, self.stages)

    def num_ranks(self) -> int:
        """Of all workers that the mesh needs: the processes that compute."""
        return sum(self.ranks()) * self.replicas

    def threads(self, ranks: int = 1) -> int:
        """Threads of each rank of a worker that has so many: as many as were asked for, or this
        host's cores shared out."""
        if self.threads_per_stage is not None:
            return max(1, self.threads_per_stage // ranks)
        return _asked_threads() or max(1, num_cores() // self.num_ranks())

    def threads_when_alone(self, ranks: int = 1) -> int:
        """Threads of each rank in a step while the pipeline's other stages are idle; 0: as many as
        otherwise. Sums differ in their last bits by the number of threads."""
        if self.lone_threads is not None:
            return self.lone_threads
        is_told = self.threads_per_stage is not None or _asked_threads() > 0
        if is_told or self.batch_invariant:
            return 0
        return max(1, num_cores() // self.replicas // ranks)


def _asked_threads() -> int:
    """What the environment says of any program's threads; 0 where it says nothing."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() else 0
