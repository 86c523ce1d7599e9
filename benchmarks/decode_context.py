"""What a long context costs a decode step, beside what it must cost: the bytes that are read.

A stage decodes with short and with long contexts, step by step in turn. A step reads each weight
once and every row's keys and values; the goal is that a step becomes no slower than in proportion
to these bytes. Contexts lie side by side in the pages, as prompts do, or anywhere.

    python -m benchmarks.decode_context --threads 1 2
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.lone_stage import LLAMA_1B, LoneStage
from benchmarks.recovery.random_model import make
from benchmarks.step_parts import ATTENTION, timed_parts


def read_bytes(stage: LoneStage, batch: int, context: int) -> int:
    """Weights once, and every row's keys and values in all layers."""
    per_token = stage.executor.cache.slot_bytes * stage.spec.num_layers
    return stage.executor.facts.weight_bytes + batch * context * per_token


def measure(stage: LoneStage, args: argparse.Namespace) -> list[str]:
    short = stage.decode([args.short] * args.batch)
    long = stage.decode([args.long] * args.batch)
    turns = [(short.take_s(), long.take_s()) for _ in range(args.steps + 1)][1:]
    with timed_parts() as clock:
        attention_s = [long.take_s() and clock.seconds.pop(ATTENTION) for _ in range(3)]
    short_s, long_s = (statistics.median(times) for times in zip(*turns, strict=True))
    slowdown = statistics.median(b / a for a, b in turns)
    ratio = read_bytes(stage, args.batch, args.long) / read_bytes(stage, args.batch, args.short)
    kv_bytes = read_bytes(stage, args.batch, args.long) - stage.executor.facts.weight_bytes
    return [
        f"{short_s * 1e3:.1f}",
        f"{long_s * 1e3:.1f}",
        f"{slowdown:.2f}",
        f"{ratio:.2f}",
        f"{slowdown / ratio:.2f}",
        f"{kv_bytes / statistics.median(attention_s) / 1e9:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint instead of 4 layers of 1.1B")
    parser.add_argument("--quantization", nargs="+", default=["none", "int8"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--short", type=int, default=128)
    parser.add_argument("--long", type=int, default=4096)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=9)
    args = parser.parse_args()
    heads = (f"{args.short}: ms", f"{args.long}: ms", "slowdown", "bytes", "of goal", "KV GB/s")
    print("| weights | contexts lie | threads | " + " | ".join(heads) + " |")
    print("|" + "---|" * (3 + len(heads)))
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = args.model or Path(scratch, "model")
        if args.model is None:
            make(model_dir, LLAMA_1B)
        for quantization in args.quantization:
            for shuffled in (False, True):
                num_tokens = args.batch * args.long
                stage = LoneStage(model_dir, num_tokens, quantization, shuffled=shuffled)
                for num_threads in args.threads:
                    torch.set_num_threads(num_threads)
                    cells = [quantization, "anywhere" if shuffled else "side by side"]
                    cells += [str(num_threads), *measure(stage, args)]
                    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
