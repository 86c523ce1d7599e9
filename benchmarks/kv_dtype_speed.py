"""How fast a stage decodes at long contexts, by the type that its keys and values are held in.

One stage with a whole model of random weights. The pages are filled with random numbers rather than
by a prompt: attention reads them all the same. Types take turns, round after round, so that
whatever else the machine does hits all of them; medians over all steps.

    python -m benchmarks.kv_dtype_speed --batch 8 --context 2048 --types float32 bfloat16 int8
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.lone_stage import LoneStage
from benchmarks.recovery.random_model import ModelShape, make
from benchmarks.stages import BLOCK_SIZE_TOKENS

_WARM_UP_STEPS = 3


def measure(args: argparse.Namespace, model: Path, *, scattered: bool) -> None:
    num_tokens = args.batch * args.context
    stages = {
        kind: LoneStage(model, num_tokens, kv_dtype=kind, shuffled=scattered) for kind in args.types
    }
    steps = {kind: stage.decode([args.context] * args.batch) for kind, stage in stages.items()}
    times: dict[str, list[float]] = {kind: [] for kind in args.types}
    for step in steps.values():
        for _ in range(_WARM_UP_STEPS):
            step.take_s()
    for _ in range(args.rounds):
        for kind, step in steps.items():
            times[kind] += [step.take_s() for _ in range(args.steps)]
    for kind, stage in stages.items():
        median = statistics.median(times[kind])
        kv_bytes_per_token = stage.executor.facts.kv_block_bytes / BLOCK_SIZE_TOKENS
        cells = [
            "scattered" if scattered else "side by side",
            kind,
            f"{kv_bytes_per_token / 1024:.2f}",
            f"{1000 * median:.1f}",
            f"{args.batch / median:.1f}",
            f"{statistics.median(times[args.types[0]]) / median:.2f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", default=["float32", "bfloat16", "float16", "int8"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5, help="of each type in a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = ModelShape(
        num_layers=args.layers,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_heads=args.hidden // 64,
    )
    print(
        f"{args.layers} layers, hidden size {shape.hidden_size}, {shape.num_heads} heads and "
        f"{shape.num_kv_heads} KV heads of {shape.head_size}; {args.batch} sequences from "
        f"{args.context} tokens on; {args.threads} threads\n"
    )
    print("| blocks | KV | KiB a token | ms a step | tokens/s | as fast |\n|" + "---|" * 6)
    with tempfile.TemporaryDirectory() as directory:
        make(Path(directory), shape)
        for scattered in (False, True):
            measure(args, Path(directory), scattered=scattered)


if __name__ == "__main__":
    main()
