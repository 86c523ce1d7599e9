"""Replays a trace of real traffic against a mesh, keeping a number of streams busy.

The trace is JSON lines with `input_length` and `output_length` in tokens. Arrival times are not
used: a new request starts whenever one of the streams is free, which is the load that finds leaks.
Prompts are random tokens from a seed; a share of the requests is cancelled in mid-stream.

    python -m benchmarks.trace_replay TRACE --target 127.0.0.1:50051 --streams 64 --cancel 0.33
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from protos import text_generation_pb2 as pb
from protos import text_generation_pb2_grpc as pb_grpc


@dataclass(frozen=True, slots=True)
class TraceEntry:
    input_tokens: int
    output_tokens: int


@dataclass(slots=True)
class ReplayResult:
    """What came of one pass over the trace."""

    num_finished: int = 0
    num_cancelled: int = 0
    generated_tokens: int = 0
    wall_s: float = 0.0
    errors: list[str] = field(default_factory=list)


def read_trace(path: Path) -> list[TraceEntry]:
    lines = map(json.loads, path.read_text().splitlines())
    return [TraceEntry(line["input_length"], line["output_length"]) for line in lines]


async def replay(
    target: str, trace: list[TraceEntry], *, streams: int, cancel_share: float, seed: int
) -> ReplayResult:
    """One pass over `trace` with `streams` requests under way at any time."""
    result = ReplayResult()
    plans = _plans(trace, cancel_share, random.Random(seed))
    started_s = time.monotonic()
    async with grpc.aio.insecure_channel(target) as channel:
        stub = pb_grpc.TextGenerationStub(channel)  # type: ignore[no-untyped-call]
        model = await stub.GetModel(pb.GetModelRequest())
        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(_one_stream(stub, plans, model.vocab_size, result))
    result.wall_s = time.monotonic() - started_s
    return result


@dataclass(frozen=True, slots=True)
class _Plan:
    entry: TraceEntry
    prompt_seed: int
    cancel_after_tokens: int | None


def _plans(trace: list[TraceEntry], cancel_share: float, rng: random.Random) -> Iterator[_Plan]:
    for entry in trace:
        cancelled = rng.random() < cancel_share and entry.output_tokens > 1
        after = rng.randrange(1, entry.output_tokens) if cancelled else None
        yield _Plan(entry, rng.getrandbits(32), after)


async def _one_stream(
    stub: pb_grpc.TextGenerationStub, plans: Iterator[_Plan], vocab_size: int, result: ReplayResult
) -> None:
    for plan in plans:
        try:
            await _one_request(stub, plan, vocab_size, result)
        except grpc.aio.AioRpcError as error:
            result.errors.append(f"{error.code().name}: {error.details()}")


async def _one_request(
    stub: pb_grpc.TextGenerationStub, plan: _Plan, vocab_size: int, result: ReplayResult
) -> None:
    call = stub.Generate(_request(plan, vocab_size))
    tokens = 0
    async for response in call:
        tokens += len(response.delta.token_ids)
        if plan.cancel_after_tokens is not None and tokens >= plan.cancel_after_tokens:
            call.cancel()
            result.num_cancelled += 1
            break
    else:
        result.num_finished += 1
        if tokens != plan.entry.output_tokens:
            result.errors.append(f"{tokens} tokens instead of {plan.entry.output_tokens}")
    result.generated_tokens += tokens


def _request(plan: _Plan, vocab_size: int) -> pb.GenerateRequest:
    rng = random.Random(plan.prompt_seed)
    prompt = [rng.randrange(3, vocab_size) for _ in range(plan.entry.input_tokens)]
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParams(temperature=1.0, seed=plan.prompt_seed),
        stopping=pb.StoppingCriteria(max_tokens=plan.entry.output_tokens, ignore_eos=True),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--target", default="127.0.0.1:50051")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--cancel", type=float, default=0.0, help="share that is cancelled")
    parser.add_argument("--loops", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    trace = read_trace(args.trace)
    for loop in range(args.loops):
        result = asyncio.run(
            replay(
                args.target,
                trace,
                streams=args.streams,
                cancel_share=args.cancel,
                seed=args.seed + loop,
            )
        )
        print(
            f"loop {loop + 1}: {result.num_finished} finished, {result.num_cancelled} cancelled, "
            f"{len(result.errors)} errors, {result.generated_tokens} tokens in "
            f"{result.wall_s:.1f} s ({result.generated_tokens / result.wall_s:.0f} tokens/s)"
        )
        for error in result.errors[:10]:
            print("  ", error)


if __name__ == "__main__":
    main()
