"""What quantisation does to what a model says: perplexity, and agreement with float32.

The first scheme, with the first type of KV, is what the others are compared with. A text is cut
into windows, each computed from its beginning; *same top* is the share of positions at which the
likeliest next token is the same. Greedy continuations of the beginnings of windows are followed
until they differ.

    python -m benchmarks.quantisation_quality TEXT --model models/demo --schemes none auto int8
    python -m benchmarks.quantisation_quality TEXT --schemes none --kv-dtypes auto bfloat16 int8
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.stages import BLOCK_SIZE_TOKENS, PIPELINE, join, load
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import (
    BlockUpdate,
    Epoch,
    Row,
    RowResult,
    SampledToken,
    SequenceState,
    Span,
    Step,
)
from stagemesh.quantization import parse_quantization
from stagemesh.sampling import SamplingSpec

_SAMPLING = SamplingSpec(temperature=0.0, num_prompt_logprobs=1)
_PROMPT_TOKENS, _NUM_GREEDY = 32, 64


@dataclass(frozen=True, slots=True)
class Quality:
    weight_bytes: int
    kv_bytes_per_token: float
    logprobs: list[float]
    top_tokens: list[int]
    continuations: list[list[int]]

    @property
    def perplexity(self) -> float:
        return math.exp(-sum(self.logprobs) / len(self.logprobs))


class Model:
    """One stage with the whole model, and one sequence at a time."""

    def __init__(self, model_dir: Path, scheme: str, dtype: str, kv_dtype: str = "auto") -> None:
        spec = ModelSpec.from_directory(model_dir)
        num_blocks = -(-spec.context_length // BLOCK_SIZE_TOKENS)
        self.executor = load(
            model_dir,
            Span(0, spec.num_layers),
            num_blocks,
            dtype=dtype,
            quantization=parse_quantization(scheme),
            kv_dtype=kv_dtype,
        )
        self._num_steps = 0

    def known(self, tokens: Sequence[int]) -> tuple[SampledToken, ...]:
        """Each token but the first, with its log-probability and the likeliest alternative."""
        row = self._row(tokens, len(tokens), logprob_positions=range(len(tokens) - 1))
        (result,) = self._execute(row, first=True)
        return result.prompt_logprobs

    def continued(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        total = len(prompt) + num_tokens
        (result,) = self._execute(self._row(prompt, total, sample=True), first=True)
        tokens = [result.sampled[0].token_id]
        for i in range(num_tokens - 1):
            row = Row(
                sequence_id=1,
                run=0,
                start=len(prompt) + i,
                num_tokens=1,
                token_ids=(tokens[-1],),
                block_updates=(),
                first_stage=0,
                end_stage=1,
                sample_positions=(len(prompt) + i,),
            )
            (result,) = self._execute(row, first=False)
            tokens.append(result.sampled[0].token_id)
        return tokens

    def _row(
        self,
        tokens: Sequence[int],
        total: int,
        *,
        sample: bool = False,
        logprob_positions: Sequence[int] = (),
    ) -> Row:
        blocks = tuple(range(-(-total // BLOCK_SIZE_TOKENS)))
        return Row(
            sequence_id=1,
            run=0,
            start=0,
            num_tokens=len(tokens),
            token_ids=tuple(tokens),
            block_updates=(BlockUpdate(0, blocks),),
            first_stage=0,
            end_stage=1,
            sample_positions=(len(tokens) - 1,) if sample else (),
            logprob_positions=tuple(logprob_positions),
            state=SequenceState(tuple(tokens), (), _SAMPLING, total),
        )

    def _execute(self, row: Row, *, first: bool) -> tuple[RowResult, ...]:
        if first:
            join(self.executor)
        step = Step(PIPELINE, Epoch(1, 1), self._num_steps, (row,))
        self._num_steps += 1
        return self.executor.execute(step, b"", self.executor.dtype).rows


def measure(model: Model, windows: Sequence[Sequence[int]]) -> Quality:
    told = [token for window in windows for token in model.known(window)]
    facts = model.executor.facts
    return Quality(
        facts.weight_bytes,
        facts.kv_block_bytes / facts.block_size_tokens,
        [token.logprob or 0.0 for token in told],
        [token.alternatives[0][0] for token in told],
        [model.continued(window[:_PROMPT_TOKENS], _NUM_GREEDY) for window in windows],
    )


def num_same(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens until the two differ."""
    return next((i for i in range(len(one)) if one[i] != other[i]), len(one))


def print_row(scheme: str, kv_dtype: str, found: Quality, base: Quality) -> None:
    pairs = list(zip(found.top_tokens, base.top_tokens, strict=True))
    same_top = sum(one == other for one, other in pairs) / len(pairs)
    followed = list(map(num_same, found.continuations, base.continuations))
    cells = [
        scheme,
        f"{found.weight_bytes / 2**20:.2f}",
        kv_dtype,
        f"{found.kv_bytes_per_token:.0f}",
        f"{found.perplexity:.4f}",
        f"{100 * same_top:.2f} %",
        f"{sum(followed) / len(followed):.1f}",
        f"{sum(count == _NUM_GREEDY for count in followed)}/{len(followed)}",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--schemes", nargs="+", default=["none", "auto", "int8", "int4-g64"])
    parser.add_argument("--kv-dtypes", nargs="+", default=["auto"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window-tokens", type=int, default=384)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    ids = tokenizer.encode(args.text.read_text(encoding="utf-8")).ids
    size = args.window_tokens
    windows = [ids[i * size : (i + 1) * size] for i in range(min(args.windows, len(ids) // size))]
    print(f"{args.model}, {args.text.name}: {len(windows)} windows of {size} tokens\n")
    heads = ["scheme", "MiB", "KV", "bytes a token", "perplexity", "same top"]
    heads += [f"greedy, of {_NUM_GREEDY}", "all the same"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    base: Quality | None = None
    for scheme, kv_dtype in itertools.product(args.schemes, args.kv_dtypes):
        found = measure(Model(args.model, scheme, args.dtype, kv_dtype), windows)
        base = base or found
        print_row(scheme, kv_dtype, found, base)


if __name__ == "__main__":
    main()
