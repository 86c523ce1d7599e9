"""StageMesh itself: a mesh as a client sees it, through gRPC, gateway and scheduler.

The others are asked in their own process, without a server before them.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path

from benchmarks.peers.protocol import Engine, Options, Peer, Timing, main
from protos import text_generation_pb2 as pb
from stagemesh import __version__
from stagemesh.bench.client import News
from stagemesh.bench.drive import Unwatched, closed_loop
from stagemesh.bench.grpc_client import GrpcClient, grpc_client
from stagemesh.bench.machine import commit
from stagemesh.bench.samples import Sample
from stagemesh.bench.summary import decode_span_s, tokens_between
from stagemesh.bench.workload import Ask

_TIMEOUT_S = 600.0


class StageMeshPeer(Peer):
    name = "stagemesh_peer"
    dtypes = ("float32", "bfloat16", "int8", "int4")
    is_divisible = True

    def convert(self, options: Options) -> None:
        """It reads the checkpoint as it is."""

    def load(self, options: Options) -> Engine:
        return _Mesh(options)

    def versions(self) -> Mapping[str, str]:
        import torch

        return {"stagemesh": f"{__version__} {commit()}".strip(), "torch": torch.__version__}


class _Mesh(Engine):
    def __init__(self, options: Options) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        ready = Path(self._scratch.name, "ready.json")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "stagemesh.cli.main", "up"),
                *("--model", str(options.model), "--stages", str(options.stages)),
                *("--threads-per-stage", str(options.threads), "--max-kv-memory", "1GiB"),
                *(("--lone-threads", str(options.lone_threads)) if options.lone_threads else ()),
                *("--grpc-port", "0", "--http-port", "0", "--scheduler-port", "0"),
                *("--ready-file", str(ready), "--log-level", "error"),
                *_dtype_options(options.dtype),
            ],
            stdout=subprocess.DEVNULL,
        )
        while not ready.exists():
            if self._process.poll() is not None:
                raise SystemExit(f"stagemesh up ended with {self._process.returncode}")
            time.sleep(0.05)
        self._address = json.loads(ready.read_text())["grpc"]

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        return asyncio.run(self._generate(prompts, new_tokens))

    async def _generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        async with grpc_client(self._address, temperature=0.0, timeout_s=_TIMEOUT_S) as client:
            asks = [Ask(len(prompt), new_tokens, n) for n, prompt in enumerate(prompts)]
            outcome = await closed_loop(_Given(client, prompts), asks, len(asks), Unwatched())
        return _timing(outcome.samples, new_tokens)

    def close(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=30)
        self._scratch.cleanup()


class _Given:
    """A client whose prompts are given instead of made."""

    def __init__(self, client: GrpcClient, prompts: Sequence[Sequence[int]]) -> None:
        self.served = client.served
        self._client = client
        self._prompts = prompts

    def prepare(self, ask: Ask) -> pb.GenerateRequest:
        request = self._client.prepare(ask)
        request.token_ids.ids[:] = self._prompts[ask.seed]
        return request

    def stream(self, prepared: pb.GenerateRequest) -> AsyncGenerator[News, None]:
        return self._client.stream(prepared)


def _timing(samples: Sequence[Sample], new_tokens: int) -> Timing:
    """Of a large batch the prompts take several steps, in which others of it decode already."""
    for sample in samples:
        if sample.error is not None or sample.output_tokens != new_tokens:
            raise SystemExit(f"{sample.output_tokens} tokens, not {new_tokens}: {sample.error}")
    prefill_s = max(sample.ttft_s or 0.0 for sample in samples)
    span = decode_span_s(samples)
    if span is None:
        return Timing(prefill_s, 0.0, 0.0)
    return Timing(prefill_s, tokens_between(samples, *span), span[1] - span[0])


# What is no type of arithmetic is weights quantised when they are loaded.
_QUANTIZATIONS = {"int8": "int8", "int4": "int4-g64"}


def _dtype_options(dtype: str) -> tuple[str, ...]:
    if dtype not in _QUANTIZATIONS:
        return ("--dtype", dtype)
    return ("--dtype", "float32", "--quantization", _QUANTIZATIONS[dtype])


if __name__ == "__main__":
    main(StageMeshPeer())
