"""`stagemesh generate "text"`: streams a completion to the terminal."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc.aio

from protos import text_generation_pb2 as pb
from stagemesh.cli.client import connection, text_generation
from stagemesh.cli.sampling_options import SamplingOptions
from stagemesh.errors import ConfigError, InternalError
from stagemesh.options import option, parse_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    text: str = option(help="the prompt; - reads it from standard input", positional=True)
    stats: bool = option(False, help="print times and speed to standard error")


@dataclass(frozen=True, slots=True)
class Stats:
    """Of one answer, as its reader saw it."""

    num_tokens: int
    first_token_s: float
    total_s: float

    def __str__(self) -> str:
        rest_s = self.total_s - self.first_token_s
        speed = f", {(self.num_tokens - 1) / rest_s:.1f} tokens/s" if self.num_tokens > 1 else ""
        return (
            f"{self.num_tokens} tokens in {self.total_s:.2f} s, "
            f"first after {self.first_token_s * 1e3:.0f} ms{speed}"
        )


def run(argv: Sequence[str]) -> int:
    options, sampling = parse_groups(
        (GenerateOptions, SamplingOptions),
        argv,
        prog="stagemesh generate",
        description="Streams a completion of the text to the terminal.",
    )
    request = sampling.request()
    request.text = sys.stdin.read() if options.text == "-" else options.text
    if not request.text:
        raise ConfigError("text must not be empty")
    stats = asyncio.run(_generate(sampling.target, request))
    if options.stats:
        print(stats, file=sys.stderr)
    return 0


async def _generate(target: str, request: pb.GenerateRequest) -> Stats:
    async with connection(target, "gateway") as channel:
        stats = await stream_text(channel, request, write_text)
    write_text("\n")
    return stats


def write_text(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


async def stream_text(
    channel: grpc.aio.Channel, request: pb.GenerateRequest, on_text: Callable[[str], None]
) -> Stats:
    """Hands the answer's text to `on_text` as it comes. Leaving early cancels the request."""
    start, first_s, usage = time.perf_counter(), None, None
    async for response in text_generation(channel).Generate(request):
        if response.WhichOneof("event") == "summary":
            usage = response.summary.usage
        else:
            if first_s is None and response.delta.token_ids:
                first_s = time.perf_counter() - start
            on_text(response.delta.text)
    if usage is None:
        raise InternalError("the answer ended without a summary")
    total_s = time.perf_counter() - start
    return Stats(usage.completion_tokens, total_s if first_s is None else first_s, total_s)
