"""How long steps take while experts come to other ranks: the longest ones tell.

One stage of two ranks, of one thread each, decodes; its router gives all tokens to two experts of
one rank, and without copies they stay there.

    python -m benchmarks.expert_moves --hidden 1024
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

# Before torch is imported, here and in the other rank.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from structlog.testing import capture_logs

from benchmarks.skewed_experts import make_model
from benchmarks.stages import BLOCK_SIZE_TOKENS, PIPELINE
from benchmarks.tensor_parallel.step_share import blocks_of, prompt_row, token_row
from stage_worker.executor import ExecutorConfig
from stage_worker.rank_processes import RankProcesses
from stage_worker.ranked_stage import RankedStage
from stage_worker.tenancy import Joining
from stagemesh.plan import Epoch, Span, Step

_RANKS = 2
_CONTEXT = 32


def step_times_ms(model_dir: Path, redundant: int, args: argparse.Namespace) -> list[float]:
    """Of decode steps, from the first on."""
    config = ExecutorConfig(
        model_dir=model_dir,
        span=Span(0, args.layers),
        device="cpu",
        dtype="float32",
        batch_invariant=False,
        block_size_tokens=BLOCK_SIZE_TOKENS,
        num_blocks=args.batch * blocks_of(_CONTEXT),
        expert_parallel=True,
        redundant_experts=redundant,
    )
    processes = RankProcesses(_RANKS)
    try:
        group = processes.own.open_group()
        stage = RankedStage.load(config, lambda loaded, total: None, processes, group)
        blocks = stage.facts.blocks_for(stage.facts.num_blocks)
        stage.join(Joining(pipeline_id=PIPELINE, stage=0, num_stages=1, blocks=blocks))
        prompts = tuple(prompt_row(row, _CONTEXT) for row in range(args.batch))
        tokens = tuple(token_row(row, _CONTEXT) for row in range(args.batch))
        times_ms = []
        for number in range(args.steps + 1):
            step = Step(PIPELINE, Epoch(1, 1), number, tokens if number else prompts)
            started_s = time.perf_counter()
            stage.execute(step, b"", "")
            times_ms.append(1e3 * (time.perf_counter() - started_s))
    finally:
        processes.kill()
    return times_ms[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=8)
    args = parser.parse_args()
    print(f"an expert has {3 * 2 * args.hidden**2 * 4 / 2**20:.0f} MiB")
    print(
        "| copies a rank | layers moved | median step, ms | longest steps, ms |\n|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model")
        sizes = {"num_layers": args.layers, "hidden": args.hidden, "num_experts": args.experts}
        make_model(model, skewed=True, **sizes)
        for redundant in (0, 1):
            with capture_logs() as logged:
                times_ms = sorted(step_times_ms(model, redundant, args))
            num_moved = sum(entry["event"] == "experts are placed anew" for entry in logged)
            longest = ", ".join(f"{time_ms:.0f}" for time_ms in times_ms[-4:])
            median_ms = times_ms[len(times_ms) // 2]
            print(f"| {redundant} | {num_moved} | {median_ms:.1f} | {longest} |", flush=True)


if __name__ == "__main__":
    main()
