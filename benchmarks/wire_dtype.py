"""What a narrower type of hidden states between stages costs in quality.

A text is read by the stages of a model in one process, once for each type; float32 is what the
others are held against. With more stages there are more boundaries to lose something at.

    python -m benchmarks.wire_dtype --model models/demo --text FILE --stages 2 6
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from benchmarks.stages import BLOCK_SIZE_TOKENS, PIPELINE, load_pipeline
from stagemesh.plan import BlockUpdate, Epoch, Row, SampledToken, SequenceState, Step
from stagemesh.sampling import SamplingSpec

TYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True, slots=True)
class Reading:
    """For every token but the first of each piece: how likely it was, and what was likeliest."""

    logprobs: tuple[float, ...]
    likeliest: tuple[int, ...]
    bytes_per_token: float


def read(model: Path, num_stages: int, wire_dtype: str, pieces: Sequence[list[int]]) -> Reading:
    num_blocks = max(map(len, pieces)) // BLOCK_SIZE_TOKENS + 2
    stages = load_pipeline(model, num_stages, num_blocks, wire_dtype=wire_dtype)
    found: list[SampledToken] = []
    num_bytes = 0
    for number, tokens in enumerate(pieces):
        step = Step(PIPELINE, Epoch(1, 1), number, (_row(number, tokens, num_stages),))
        payload, dtype = memoryview(b""), ""
        for stage in stages:
            output = stage.execute(step, payload, dtype)
            payload, dtype = output.payload, output.dtype
            num_bytes += len(payload)
        found += output.rows[0].prompt_logprobs
    num_tokens = sum(map(len, pieces)) * max(1, num_stages - 1)
    return Reading(
        tuple(float(token.logprob or 0.0) for token in found),
        tuple(token.alternatives[0][0] for token in found),
        num_bytes / num_tokens,
    )


def _row(number: int, tokens: list[int], num_stages: int) -> Row:
    """One piece of text, all of whose tokens' log-probabilities are wanted."""
    table = tuple(range(len(tokens) // BLOCK_SIZE_TOKENS + 1))
    sampling = SamplingSpec(num_prompt_logprobs=1)
    return Row(
        sequence_id=number,
        run=0,
        start=0,
        num_tokens=len(tokens),
        token_ids=tuple(tokens),
        block_updates=(BlockUpdate(0, table),),
        first_stage=0,
        end_stage=num_stages,
        logprob_positions=tuple(range(len(tokens) - 1)),
        state=SequenceState(tuple(tokens), (), sampling, len(tokens) + 1),
    )


def cells(reading: Reading, exact: Reading) -> list[str]:
    pairs = list(zip(reading.logprobs, exact.logprobs, strict=True))
    off = sorted(abs(ours - theirs) for ours, theirs in pairs)
    agree = [a == b for a, b in zip(reading.likeliest, exact.likeliest, strict=True)]
    return [
        f"{reading.bytes_per_token:.0f}",
        f"{-sum(reading.logprobs) / len(pairs):.4f}",
        f"{sum(off) / len(off):.5f}",
        f"{off[int(0.99 * len(off))]:.4f}",
        f"{100 * sum(agree) / len(agree):.2f}",
    ]


HEADS = (
    *("stages", "wire", "bytes a token", "nats a token", "off by, mean", "p99"),
    "same likeliest token %",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--stages", type=int, nargs="+", default=[2])
    parser.add_argument("--pieces", type=int, default=40)
    parser.add_argument("--length", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    ids = tokenizer.encode(args.text.read_text()).ids
    pieces = [ids[i * args.length : (i + 1) * args.length] for i in range(args.pieces)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    print(f"{sum(map(len, pieces))} tokens of {args.text.name}\n")
    print("| " + " | ".join(HEADS) + " |\n|" + "---|" * len(HEADS))
    for num_stages in args.stages:
        exact = read(args.model, num_stages, "float32", pieces)
        for wire_dtype in TYPES:
            reading = read(args.model, num_stages, wire_dtype, pieces)
            row = [str(num_stages), wire_dtype, *cells(reading, exact)]
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
