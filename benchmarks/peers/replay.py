"""The highest rate at which a trace's requests are served well: StageMesh and peers, one client.

Each engine is behind an OpenAI-compatible server and asked by `stagemesh bench --url`. First one
request at a time, then the trace at rising rates, until the 99th percentile of the time per output
token is twice that of the first run, or that of the time to first token is more than --max-ttft: an
engine that takes one request after another is never slow at tokens, it lets users wait.

    python -m benchmarks.peers.replay --trace TRACE.jsonl --dtype int8 --rates 0.05 0.1 0.2 0.3
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.environments import OURS, REPO, Environments
from benchmarks.peers.make_model import SIZES

SERVERS = (OURS, "openvino", "llama_cpp")
_PEER_DTYPES = {
    "float32": {"openvino": "float32", "llama_cpp": "float32"},
    "int8": {"openvino": "int8", "llama_cpp": "q8_0"},
}
_HEADS = ("server", "rate", "requests/s", "tokens/s", "TPOT p99 ms", "TTFT p50 s", "TTFT p99 s")
_START_TIMEOUT_S = 180.0
_SLOWER = 2.0


@dataclass(frozen=True, slots=True)
class Served:
    """Of one run; milliseconds. `rate` None: one request at a time."""

    rate: float | None
    requests_per_s: float
    tokens_per_s: float
    tpot_p99_ms: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    num_failed: int


def main() -> int:
    args = _parser().parse_args()
    environments = Environments(args.work.resolve(), args.size)
    environments.make_model()
    print(
        "| server | rate of the trace | requests/s | tokens/s | TPOT p99 ms | TTFT p50 s | p99 s |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    best: dict[str, Served | None] = {}
    for name in args.servers:
        with _server(name, environments, args) as url:
            best[name] = _highest(name, url, args)
    for name, served in best.items():
        told = "none" if served is None else f"{served.rate:g}: {served.tokens_per_s:.1f} tokens/s"
        print(f"\n{name}: highest rate that is served well: {told}")
    return 0


def _highest(name: str, url: str, args: argparse.Namespace) -> Served | None:
    alone = _bench(url, args, None)
    print(_row(name, alone), flush=True)
    best = None
    for rate in args.rates:
        served = _bench(url, args, rate)
        print(_row(name, served), flush=True)
        if (
            served.num_failed
            or served.tpot_p99_ms > _SLOWER * alone.tpot_p99_ms
            or served.ttft_p99_ms > 1e3 * args.max_ttft
        ):
            break
        best = served
    return best


def _bench(url: str, args: argparse.Namespace, rate: float | None) -> Served:
    load = ("--concurrency", "1") if rate is None else ("--rate-scale", str(rate))
    num_requests = args.alone_requests if rate is None else args.num_requests
    command = [
        *(sys.executable, "-m", "stagemesh.cli.main", "bench", "--url", url, "--json"),
        *("--trace", str(args.trace), "--max-requests", str(num_requests)),
        *("--num-requests", str(num_requests), "--warm-up", "2", *load),
    ]
    done = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):  # 1: requests have failed
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    (report,) = json.loads(done.stdout)["reports"]
    return Served(
        rate,
        report["requests_per_s"],
        report["output_tokens_per_s"],
        report["tpot_ms"]["p99"],
        report["ttft_ms"]["p50"],
        report["ttft_ms"]["p99"],
        report["num_failed"],
    )


def _row(name: str, served: Served) -> str:
    rate = "one at a time" if served.rate is None else f"{served.rate:g}"
    failed = f" ({served.num_failed} failed)" if served.num_failed else ""
    return (
        f"| {name} | {rate} | {served.requests_per_s:.2f}{failed} | {served.tokens_per_s:.1f} | "
        f"{served.tpot_p99_ms:.0f} | {served.ttft_p50_ms / 1e3:.1f} | "
        f"{served.ttft_p99_ms / 1e3:.1f} |"
    )


@contextmanager
def _server(name: str, environments: Environments, args: argparse.Namespace) -> Iterator[str]:
    """A server that answers, as the base URL of its API."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = _command(name, environments, args, port)
    environ = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=REPO, env=environ, stdout=log, stderr=log)
        try:
            _wait_for(process, port)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait()


def _command(
    name: str, environments: Environments, args: argparse.Namespace, port: int
) -> Sequence[str]:
    if name == OURS:
        dtype = () if args.dtype == "float32" else ("--quantization", args.dtype)
        return [
            *(sys.executable, "-m", "stagemesh.cli.main", "up", "--stages", "1"),
            *("--model", str(environments.model), "--threads-per-stage", str(args.threads)),
            *("--http-port", str(port), "--grpc-port", "0", "--scheduler-port", "0"),
            *("--dtype", "float32", "--max-kv-memory", "1GiB", "--log-level", "error", *dtype),
        ]
    environments.make_venv(name)
    environments.convert(name, _PEER_DTYPES[args.dtype][name])
    converted = environments.converted(name, _PEER_DTYPES[args.dtype][name])
    python = str(environments.python(name))
    if name == "openvino":
        server = (python, "-m", "benchmarks.peers.openvino_server", "--out", str(converted))
        return [*server, "--threads", str(args.threads), "--port", str(port)]
    return [
        *(python, "-m", "llama_cpp.server", "--model", str(converted / "model.gguf")),
        *("--port", str(port), "--n_threads", str(args.threads), "--n_ctx", "2048"),
        *("--n_threads_batch", str(args.threads), "--interrupt_requests", "False"),
    ]


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    """Until something listens. Raises SystemExit."""
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(f"no server: {process.args!r}") from None
            time.sleep(0.2)
        else:
            return


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.replay", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--dtype", choices=_PEER_DTYPES, default="int8")
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.2, 0.3])
    parser.add_argument("--num-requests", type=int, default=60)
    parser.add_argument("--alone-requests", type=int, default=8)
    parser.add_argument("--max-ttft", type=float, default=10.0, help="seconds")
    default = Path(tempfile.gettempdir(), "stagemesh-peers")
    parser.add_argument("--work", type=Path, default=default, help=f"[{default}]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
