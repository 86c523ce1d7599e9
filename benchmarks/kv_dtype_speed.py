"""How fast a stage decodes at long contexts, by the type that its keys and values are held in.

One stage with a whole model of random weights. The pages are filled with random numbers rather than
by a prompt: attention reads them all the same. Types take turns, round after round, so that
whatever else the machine does hits all of them; medians over all steps.

    python -m benchmarks.kv_dtype_speed --batch 8 --context 2048 --types float32 bfloat16 int8
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.recovery.random_model import ModelShape, make
from stage_worker.executor import ExecutorConfig, StageExecutor
from stage_worker.kv_cache import KvCache
from stagemesh.plan import BlockUpdate, Epoch, Row, SequenceState, Span, Step
from stagemesh.sampling import SamplingSpec

_BLOCK = 16
_GREEDY = SamplingSpec(temperature=0.0)
_WARM_UP_STEPS = 3


class Decoding:
    """Sequences of `context` tokens that decode, on a stage of their own."""

    def __init__(
        self, model: Path, shape: ModelShape, kv_dtype: str, tables: Sequence[tuple[int, ...]]
    ) -> None:
        config = ExecutorConfig(
            model,
            Span(0, shape.num_layers),
            "cpu",
            "float32",
            batch_invariant=False,
            block_size_tokens=_BLOCK,
            num_blocks=sum(map(len, tables)),
            kv_dtype=kv_dtype,
        )
        self.executor = StageExecutor.load(config, lambda loaded_bytes, total_bytes: None)
        facts = self.executor.facts
        self.kv_bytes_per_token = facts.kv_block_bytes / _BLOCK
        self.executor.join(
            pipeline_id="p",
            stage=0,
            num_stages=1,
            blocks=facts.blocks_for(facts.num_blocks),
            keep_kv=False,
        )
        _fill(self.executor.cache, shape)
        self._tables = tables
        self._num_steps = 0

    def step_s(self, position: int) -> float:
        """The next token of every sequence, at this position."""
        rows = tuple(self._row(i, position) for i in range(len(self._tables)))
        step = Step("p", Epoch(1, 1), self._num_steps, rows)
        self._num_steps += 1
        started = time.perf_counter()
        results = self.executor.execute(step, b"", self.executor.dtype).rows
        assert all(result.error is None for result in results)
        return time.perf_counter() - started

    def _row(self, i: int, position: int) -> Row:
        first = self._num_steps == 0
        known = (1,) * (position + 1)
        return Row(
            sequence_id=i,
            run=0,
            start=position,
            num_tokens=1,
            token_ids=(1,),
            block_updates=(BlockUpdate(0, self._tables[i]),) if first else (),
            first_stage=0,
            end_stage=1,
            sample_positions=(position,),
            state=SequenceState(known, (), _GREEDY, len(self._tables[i]) * _BLOCK)
            if first
            else None,
        )


@torch.inference_mode()
def _fill(cache: KvCache, shape: ModelShape) -> None:
    size = (cache.block_size_tokens, shape.num_kv_heads, shape.head_size)
    for layer in range(shape.num_layers):
        for block in range(cache.num_blocks):
            slots = torch.arange(block * size[0], (block + 1) * size[0])
            cache.write(layer, slots, torch.randn(size), torch.randn(size))


def tables_of(batch: int, num_tokens: int, *, scattered: bool) -> list[tuple[int, ...]]:
    per_sequence = -(-num_tokens // _BLOCK)
    blocks = list(range(batch * per_sequence))
    if scattered:
        random.Random(1).shuffle(blocks)
    return [tuple(blocks[i * per_sequence : (i + 1) * per_sequence]) for i in range(batch)]


def measure(args: argparse.Namespace, model: Path, shape: ModelShape, *, scattered: bool) -> None:
    num_tokens = args.context + args.rounds * args.steps + _WARM_UP_STEPS
    tables = tables_of(args.batch, num_tokens, scattered=scattered)
    decodings = {kind: Decoding(model, shape, kind, tables) for kind in args.types}
    times: dict[str, list[float]] = {kind: [] for kind in args.types}
    for each in decodings.values():
        for i in range(_WARM_UP_STEPS):
            each.step_s(args.context + i)
    for number in range(args.rounds):
        begin = args.context + _WARM_UP_STEPS + number * args.steps
        for kind, each in decodings.items():
            times[kind] += [each.step_s(begin + i) for i in range(args.steps)]
    for kind, each in decodings.items():
        median = statistics.median(times[kind])
        cells = [
            "scattered" if scattered else "side by side",
            kind,
            f"{each.kv_bytes_per_token / 1024:.2f}",
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
            measure(args, Path(directory), shape, scattered=scattered)


if __name__ == "__main__":
    main()
