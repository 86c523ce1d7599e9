"""Options of a stage worker process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stage_worker.kv_dtype import KV_DTYPES, resolve_kv_dtype
from stage_worker.rank_options import TRANSPORTS, shares_memory
from stagemesh.adapters import parse_adapters
from stagemesh.addresses import split_address
from stagemesh.errors import ConfigError
from stagemesh.option_values import Kind
from stagemesh.options import check_options, option
from stagemesh.plan import Span
from stagemesh.quantization import parse_quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """Raises ConfigError, naming the option."""

    model: Path = option(help="directory of the model: config.json and safetensors files")
    scheduler: str = option("127.0.0.1:50050", help="address of the scheduler, host:port")
    listen: str = option("0.0.0.0:50052", help="address to listen on; port 0 picks a free one")
    advertise: str = option(
        "", help="host or host:port at which others reach this worker, if not where it listens"
    )
    worker_id: str = option("", help="name, the same after a restart; else host name and port")
    layers: Span | None = option(
        None, help="hold exactly these layers; else the scheduler assigns some"
    )
    device: str = option("cpu", help="cpu, cuda or cuda:N")
    dtype: str = option(
        "auto",
        help="of weights and arithmetic; auto: float32 on the cpu, else the files' own",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    wire_dtype: str = option(
        "auto",
        help="in which type hidden states travel; auto: in that of --dtype. All workers of a mesh "
        "must say the same",
        choices=("auto", "float32", "bfloat16", "int8"),
    )
    kv_dtype: str = option(
        "auto",
        help="in which type keys and values are held, on a cpu; auto: in that of --dtype; int8 has "
        "a scale for each token and KV head. All workers of a mesh must say the same",
        choices=KV_DTYPES,
    )
    quantization: str = option(
        "auto",
        help="how weights are held: auto (as the files have them), none, int8, int4-g32, int4-g64, "
        "int4-g128; parts that differ follow: int4-g64,head=none,0:2=int8",
    )
    adapters: tuple[str, ...] = option(
        (),
        flag="adapter",
        help="LoRA adapters in PEFT's layout as NAME=DIR, more than one with commas or by "
        "repeating this; requests choose one as their model. All workers of a mesh must hold the "
        "same",
    )
    batch_invariant: bool = option(
        False, help="a sequence's numbers do not depend on its batch (float32 on cpu)"
    )
    block_size_tokens: int = option(
        16, help="tokens per KV block", flag="block-size", minimum=1, maximum=1024
    )
    max_kv_memory_bytes: int | None = option(
        None, help="memory for KV; else a share of what is free", kind=Kind.SIZE, minimum=1
    )
    num_blocks: int | None = option(None, help="number of KV blocks, instead", minimum=1)
    max_log_memory_bytes: int | None = option(
        None,
        help="host memory for the log of what was sent, from which the next stage is rebuilt; else "
        "as much as all KV blocks need; 0: none",
        kind=Kind.SIZE,
        minimum=0,
    )
    step_timeout_s: float = option(
        2.0,
        help="a step that computes for longer than this, and than ten times what it should take, "
        "ends the process",
        kind=Kind.DURATION,
        minimum=0.1,
    )
    load_timeout_s: float = option(
        120.0,
        help="layers that are loaded no further for this long end the process",
        kind=Kind.DURATION,
        minimum=0.1,
    )
    drain_timeout_s: float = option(
        8.0,
        help="told to stop, how long to wait for the layers to be handed over",
        kind=Kind.DURATION,
        minimum=0,
    )
    threads: int = option(
        0,
        help="threads for arithmetic, of each rank; 0: OMP_NUM_THREADS, or all cores shared out",
        minimum=0,
        maximum=1024,
    )
    tensor_parallel: int = option(
        1,
        help="ranks that share the work of every layer, each a process with threads of its own; "
        "on a cpu",
        minimum=1,
        maximum=64,
    )
    expert_parallel: bool = option(
        False,
        help="ranks have whole experts of a mixture instead of a part of each; what else there is "
        "in a layer they share as ever",
    )
    redundant_experts: int = option(
        0,
        help="experts that each rank has beyond its share, with --expert-parallel: those that the "
        "routers favour come to be on several ranks",
        minimum=0,
        maximum=1024,
    )
    rank_transport: str = option(
        "auto",
        help="how ranks exchange what they computed; auto: through memory where the processor "
        "allows, else by gloo",
        choices=TRANSPORTS,
    )
    lone_threads: int = option(
        0,
        help="threads for a step that is alone in its pipeline: where other stages share this "
        "host, their cores are idle meanwhile; 0: as otherwise",
        minimum=0,
        maximum=1024,
    )

    def __post_init__(self) -> None:
        check_options(self)
        parse_quantization(self.quantization)
        if self.adapter_dirs() and self.device != "cpu":
            raise ConfigError(f"--adapter needs --device cpu, not {self.device}")
        for name in ("scheduler", "listen"):
            try:
                split_address(getattr(self, name))
            except ConfigError as error:
                raise ConfigError(f"--{name}: {error}") from None
        if self.layers is not None and not 0 <= self.layers.start < self.layers.end:
            raise ConfigError(f"--layers must be FIRST:END with FIRST < END, not {self.layers}")
        if self.tensor_parallel > 1 and self.device != "cpu":
            raise ConfigError(
                f"--tensor-parallel {self.tensor_parallel} needs --device cpu: ranks on GPUs are "
                f"not there yet (--device {self.device})"
            )
        if self.tensor_parallel > 1:
            shares_memory(self.rank_transport)
        if self.redundant_experts and not (self.expert_parallel and self.tensor_parallel > 1):
            raise ConfigError(
                "--redundant-experts needs --expert-parallel and --tensor-parallel above 1"
            )
        if self.batch_invariant and self.redundant_experts:
            raise ConfigError(
                "--redundant-experts has the order of sums follow the load, which "
                "--batch-invariant rules out"
            )
        if self.batch_invariant and self.lone_threads:
            raise ConfigError(
                "--lone-threads makes numbers depend on what else is under way, which "
                "--batch-invariant rules out"
            )
        if self.batch_invariant and self.wire_dtype not in ("auto", "float32"):
            raise ConfigError(
                f"--wire-dtype {self.wire_dtype} makes numbers depend on where the model is cut, "
                "which --batch-invariant rules out"
            )

    def resolved_dtype(self, stored_dtype: str) -> str:
        """bfloat16 and float16 arithmetic is slow on most CPUs: there "auto" is float32."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if self.device == "cpu" or self.batch_invariant else stored_dtype

    def adapter_dirs(self) -> dict[str, Path]:
        """By name. Raises ConfigError."""
        return parse_adapters(self.adapters, self.model.resolve().name)

    def resolved_kv_dtype(self, dtype: str) -> str:
        """`dtype` is what is computed with. Raises ConfigError where the device cannot have it."""
        return resolve_kv_dtype(self.kv_dtype, dtype, self.device)
