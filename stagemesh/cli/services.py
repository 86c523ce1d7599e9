"""How each service of a mesh on this host is started: its command line and its environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from stagemesh.addresses import join_address
from stagemesh.cli.stage_ranks import layers_by_ranks
from stagemesh.cli.up_options import UpOptions
from stagemesh.cores import num_cores
from stagemesh.model_spec import ModelSpec
from stagemesh.options import options_of
from stagemesh.quantization import AUTO


@dataclass(frozen=True, slots=True)
class Service:
    role: str
    name: str
    command: tuple[str, ...]
    environ: Mapping[str, str]


def scheduler(options: UpOptions) -> Service:
    flags = {
        "--listen": join_address(options.host, options.scheduler_port),
        "--stages": options.stages,
        "--replicas": options.replicas,
        "--max-step-tokens": options.max_step_tokens,
        "--max-chunk-tokens": options.max_chunk_tokens,
    }
    return _service("scheduler", "scheduler", flags, options)


def gateway(options: UpOptions, scheduler_address: str) -> Service:
    flags = {
        "--scheduler": scheduler_address,
        "--model": options.model_dir(),
        "--host": options.host,
        "--grpc-port": options.grpc_port,
        "--http-port": options.http_port,
        "--drain-timeout": f"{options.drain_timeout_s}s",
    }
    return _service("gateway", "gateway", flags, options)


def worker(options: UpOptions, scheduler_address: str, index: int, port: int) -> Service:
    all_ranks, stage = options.ranks(), index % options.stages
    ranks = all_ranks[stage]
    layers = None
    # Workers that differ are bound to their layers; of others the scheduler says who has which.
    if len(set(all_ranks)) > 1 and index < options.num_stage_workers:
        num_layers = ModelSpec.from_directory(options.model_dir()).num_layers
        span = layers_by_ranks(all_ranks, num_layers)[stage]
        layers = f"{span.start}:{span.end}"
    flags = {
        "--scheduler": scheduler_address,
        "--model": options.model_dir(),
        "--worker-id": f"worker-{index}",
        "--tensor-parallel": ranks if ranks > 1 else None,
        "--expert-parallel": options.expert_parallel,
        "--redundant-experts": options.redundant_experts if ranks > 1 else None,
        "--layers": layers,
        "--listen": f"127.0.0.1:{port}",
        "--device": options.device,
        "--dtype": options.dtype,
        "--wire-dtype": options.wire_dtype,
        "--kv-dtype": options.kv_dtype,
        "--quantization": options.quantization,
        "--adapter": ",".join(options.adapters) or None,
        "--max-kv-memory": options.max_kv_memory_bytes,
        "--num-blocks": options.num_blocks,
        "--block-size": options.block_size_tokens,
        "--batch-invariant": options.batch_invariant,
        "--lone-threads": options.threads_when_alone(ranks),
    }
    return _service("worker", f"worker-{index}", flags, options, ranks)


_MODULES = {"scheduler": "scheduler", "gateway": "gateway", "worker": "stage_worker"}


# Of GNU's OpenMP, which torch comes with; some tenths of a millisecond.
_STEP_PAUSE_SPINS = "30000"


def _service(
    role: str,
    name: str,
    flags: Mapping[str, object | None],
    options: UpOptions,
    ranks: int = 1,
) -> Service:
    command = [sys.executable, "-m", _MODULES[role]]
    for flag, value in {**flags, "--log-format": "json"}.items():
        command += _words(flag, value)
    return Service(role, name, tuple(command), _environ(options, ranks))


def _words(flag: str, value: object | None) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, str(value)]


def _environ(options: UpOptions, ranks: int) -> dict[str, str]:
    """This process's, without what was meant for `up` itself."""
    own = {option.variable for option in options_of(UpOptions)}
    environ = {name: value for name, value in os.environ.items() if name not in own}
    if options.config is not None:
        environ["STAGEMESH_CONFIG"] = str(options.config)
    # Workers of one host share its cores; a thread that waits must not spin on another's. Where
    # each has its own it may, for as long as work pauses within a step: being woken takes longer.
    threads = options.threads(ranks)
    environ["OMP_NUM_THREADS"] = str(threads)
    environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if threads * options.num_ranks() <= num_cores() and not _has_int4(options):
        environ.setdefault("GOMP_SPINCOUNT", _STEP_PAUSE_SPINS)
    # What gRPC's core notes about connections that come and go.
    environ.setdefault("GRPC_VERBOSITY", "ERROR")
    return environ


def _has_int4(options: UpOptions) -> bool:
    """Layers of 4 bits are computed by threads of another library, which spin by themselves."""
    told = options.quantization or AUTO
    if AUTO not in told:
        return "int4" in told
    stored = ModelSpec.from_directory(options.model_dir()).stored
    return "int4" in told or (stored is not None and any(way.bits == 4 for _, way in stored.ways))
