"""Run as a program: how often a stage that is rebuilt by prefill gives other tokens than before.

    python tests/support/measure_replay.py MODEL_DIR [--num 64] [--stages 3]

With kernels whose bits depend on the number of rows, KV that is computed for many positions at
once differs in its last bits from KV that was computed token by token. Requests decode greedily, a
stage is lost in the middle of their outputs and rebuilt, and their tokens are compared with an
undisturbed run's. A line of JSON for each dtype, way of rebuilding and lost stage.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from support.stages import Chain, Live, Wish

from stagemesh.plan import Row
from stagemesh.sampling import SamplingSpec

PROMPT_TOKENS, OUTPUT_TOKENS, LOST_AFTER, CHUNK = 48, 128, 64, 512
GREEDY = SamplingSpec(temperature=0.0, num_logprobs=2)


def make_prompts(model: Path, num: int) -> list[list[int]]:
    """What the model itself says, so that it is text of its kind."""
    chain = Chain(model, 1, num_blocks=4096)
    wishes = [
        Wish([0], PROMPT_TOKENS - 1, SamplingSpec(temperature=1.0, seed=seed))
        for seed in range(num)
    ]
    return [live.tokens for live in chain.run(wishes, max_rows=32)]


def decode(chain: Chain, lives: list[Live], num_tokens: int) -> None:
    for _ in range(num_tokens):
        rows = [live.row(len(chain.stages), CHUNK) for live in lives]
        for live, row, result in zip(lives, rows, chain.execute(rows), strict=True):
            live.take(row, result)


def rebuild(chain: Chain, lives: list[Live], stage: int, use_log: bool) -> None:
    chain.lose([stage])
    for live in lives:
        live.first = True
    first = stage if use_log else 0
    rows = [_row(live, first, stage) for live in lives]
    chain.execute(rows)
    for live in lives:
        live.first = False


def _row(live: Live, first: int, stage: int) -> Row:
    return live.rebuild_row(0, live.computed, range(first, stage + 1), stage)


def run(chain: Chain, prompts: list[list[int]], lost: tuple[int, bool] | None) -> list[Live]:
    lives = [chain.start(Wish(prompt, OUTPUT_TOKENS, GREEDY)) for prompt in prompts]
    decode(chain, lives, LOST_AFTER)
    if lost is not None:
        rebuild(chain, lives, *lost)
    decode(chain, lives, OUTPUT_TOKENS - LOST_AFTER)
    chain.execute([], [chain.finish(live) for live in lives])
    return lives


def gap(live: Live, index: int) -> float:
    """How much more probable the token was than the next best, as a difference of logarithms."""
    (_, best), (_, second) = live.sampled[index].alternatives
    return best - second


def compare(old: list[Live], new: list[Live]) -> dict[str, object]:
    gaps = list(_gaps(old, new))
    num_after = (OUTPUT_TOKENS - LOST_AFTER) * len(old)
    return {
        "requests": len(old),
        "differ": len(gaps),
        "tokens_before_a_difference": round(num_after / len(gaps)) if gaps else None,
        "largest_gap_where_they_part": round(max(gaps), 4) if gaps else None,
    }


def _gaps(old: list[Live], new: list[Live]) -> Iterator[float]:
    for one, other in zip(old, new, strict=True):
        pairs = zip(one.sampled, other.sampled, strict=True)
        differing = (i for i, (a, b) in enumerate(pairs) if a.token_id != b.token_id)
        if (index := next(differing, None)) is not None:
            yield gap(one, index)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--num", type=int, default=64)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    prompts = make_prompts(options.model, options.num)
    for dtype, invariant in (("float32", True), ("float32", False), ("bfloat16", False)):
        chain = Chain(
            options.model,
            options.stages,
            dtype=dtype,
            batch_invariant=invariant,
            num_blocks=4096,
            device=options.device,
        )
        expected = run(chain, prompts, None)
        again = compare(expected, run(chain, prompts, None))
        print(json.dumps({"dtype": dtype, "invariant": invariant, "lost": None, **again}))
        for stage in range(options.stages):
            for use_log in (True, False) if stage else (False,):
                told = compare(expected, run(chain, prompts, (stage, use_log)))
                way = {"dtype": dtype, "invariant": invariant, "lost": stage, "log": use_log}
                print(json.dumps({**way, **told}), flush=True)


if __name__ == "__main__":
    main()
