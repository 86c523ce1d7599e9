"""Decode and prefill of a stage on a CUDA device, beside what the device could do at best.

Weights are random and made on the spot; a second run with the same directory finds them there. The
limits (bandwidth, rate of a matrix product) are measured in the same run. Decode is greedy. Times
are those of the stages one after another, each from a step's plan and input to its output with all
of its host work; what lies between stages is not in them.

    python -m benchmarks.cuda_stage --shape 8b --workers 1
    python -m benchmarks.cuda_stage --shape 8b --workers 2      # half of the layers each, one card
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.cuda_stage.limits import Limits, decode_bytes, measure_limits, prefill_flop
from benchmarks.cuda_stage.plans import Planned, Plans
from benchmarks.cuda_stage.shapes import SHAPES, ModelShape, make_checkpoint
from benchmarks.cuda_stage.workers import Pipeline, StageConfig, pipeline
from stagemesh.sampling import SamplingSpec

BLOCK_SIZE_TOKENS = 16


def _decode(
    stages: Pipeline, plans: Plans, batch: int, context: int, steps: int, sampling: SamplingSpec
) -> float:
    """Median seconds of a step, in the stages alone."""
    total = context + steps + 8
    sequences = [plans.sequence(context, total, sampling) for _ in range(batch)]
    for sequence in sequences:
        for row in sequence.chunks(2048):
            (result,) = stages.execute(plans.step([row])).rows
            sequence.take(result)
    times_s = []
    for i in range(steps + 4):
        done = stages.execute(plans.step([sequence.decode() for sequence in sequences]))
        for sequence, result in zip(sequences, done.rows, strict=True):
            sequence.take(result)
        if i >= 4:
            times_s.append(sum(done.stages_s))
    plans.end(sequences)
    return statistics.median(times_s)


def _prefill(stages: Pipeline, plans: Plans, num_tokens: int, chunk: int, rounds: int) -> float:
    """Seconds of the fastest of some prompts, in the stages alone."""
    times_s = []
    for _ in range(rounds):
        sequence: Planned = plans.sequence(num_tokens, num_tokens + 1, SamplingSpec(temperature=0))
        steps = [plans.step([row]) for row in sequence.chunks(chunk)]
        times_s.append(sum(sum(stages.execute(step).stages_s) for step in steps))
        plans.end([sequence])
    return min(times_s)


def _measure(
    stages: Pipeline,
    plans: Plans,
    shape: ModelShape,
    limits: Limits | None,
    args: argparse.Namespace,
) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    sampling = SamplingSpec(temperature=args.temperature)
    for batch in args.batch:
        step_s = _decode(stages, plans, batch, args.context, args.steps, sampling)
        needed = decode_bytes(shape, batch, args.context + args.steps / 2)
        found.append({
            "what": "decode", "batch": batch, "context": args.context, "step_ms": step_s * 1e3,
            "tokens_per_s": batch / step_s, "bytes": needed,
            "of_copy_bandwidth": needed / step_s / limits.copy_bytes_per_s if limits else None,
            "of_read_bandwidth": needed / step_s / limits.read_bytes_per_s if limits else None,
        })  # fmt: skip
        print(json.dumps(found[-1]), flush=True)
    for num_tokens in args.prefill:
        seconds = _prefill(stages, plans, num_tokens, args.chunk or num_tokens, 3)
        flop = prefill_flop(shape, num_tokens)
        found.append({
            "what": "prefill", "tokens": num_tokens, "chunk": args.chunk, "ms": seconds * 1e3,
            "tokens_per_s": num_tokens / seconds,
            "of_matmul_peak": flop / seconds / limits.flop_per_s if limits else None,
        })  # fmt: skip
        print(json.dumps(found[-1]), flush=True)
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 32, 128])
    parser.add_argument("--context", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--chunk", type=int, help="tokens of a step; else the whole prompt")
    parser.add_argument("--model-dir", type=Path, help="where the weights are, or will be")
    parser.add_argument("--json", type=Path, help="results as JSON")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    shape = SHAPES[args.shape]
    device = torch.device(args.device)
    limits = measure_limits(device) if device.type == "cuda" else None
    if limits is not None:
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}: copies at "
              f"{limits.copy_bytes_per_s / 1e12:.2f} TB/s, reads at "
              f"{limits.read_bytes_per_s / 1e12:.2f} TB/s, matrix products at "
              f"{limits.flop_per_s / 1e12:.0f} TFLOP/s", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = args.model_dir or Path(scratch)
        if not (model_dir / "model.safetensors.index.json").exists():
            make_checkpoint(model_dir, shape, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        longest = max(
            [batch * (args.context + args.steps + 24) for batch in args.batch] + args.prefill
        )
        num_blocks = longest // BLOCK_SIZE_TOKENS + 2 + max(args.batch, default=0)
        config = StageConfig(model_dir, args.device, num_blocks, BLOCK_SIZE_TOKENS)
        plans = Plans(args.workers, num_blocks, BLOCK_SIZE_TOKENS, shape.vocab_size)
        with pipeline(config, shape.num_layers, args.workers) as stages:
            print(f"loaded in {stages.load_s} s", flush=True)
            found = _measure(stages, plans, shape, limits, args)
            result = {"shape": args.shape, "workers": args.workers, "load_s": stages.load_s,
                      "limits": limits and dataclasses.asdict(limits),
                      "measured": found}  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
