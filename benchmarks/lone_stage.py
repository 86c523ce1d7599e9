"""A whole model as one stage in this process, for timing its decode steps at any context.

No prompt is executed: pages are filled with random numbers, which are as good as any for a time. A
step is the same one again and again, of the token at the end of each context.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import torch

from benchmarks.recovery.random_model import ModelShape
from benchmarks.stages import BLOCK_SIZE_TOKENS, PIPELINE, join, load
from stage_worker.kv_cache import KvCache
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import BlockUpdate, Epoch, Row, RowResult, SequenceState, Span, Step
from stagemesh.quantization import parse_quantization
from stagemesh.sampling import SamplingSpec

# Four layers of a Llama of 1.1B parameters.
LLAMA_1B = ModelShape(
    num_layers=4, hidden_size=2048, intermediate_size=5632, num_heads=32, num_kv_heads=4
)
GREEDY = SamplingSpec(temperature=0.0)


class LoneStage:
    """`shuffled`: blocks of contexts lie anywhere, and not side by side."""

    def __init__(
        self,
        model_dir: Path,
        num_tokens: int,
        quantization: str = "auto",
        *,
        kv_dtype: str = "auto",
        shuffled: bool = False,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:
        self.spec = ModelSpec.from_directory(model_dir)
        num_blocks = num_tokens // BLOCK_SIZE_TOKENS + 256
        self.executor = load(
            model_dir,
            Span(0, self.spec.num_layers),
            num_blocks,
            quantization=parse_quantization(quantization),
            kv_dtype=kv_dtype,
            adapters=adapters or {},
        )
        _fill(self.executor.cache, self.spec)
        join(self.executor)
        self._blocks = list(range(num_blocks))
        if shuffled:
            random.Random(0).shuffle(self._blocks)
        self._num_steps = self._num_sequences = 0

    def decode(
        self,
        contexts: Sequence[int],
        sampling: SamplingSpec = GREEDY,
        adapters: Sequence[str] = ("",),
    ) -> Decode:
        """A step of one token for each of these contexts, the token itself counted; sequences take
        the adapters in turn."""
        numbers = range(self._num_sequences, self._num_sequences + len(contexts))
        self._num_sequences = numbers.stop
        free = iter(self._blocks)
        rows = []
        for number, context, adapter in zip(numbers, contexts, cycle(adapters)):
            blocks = tuple(next(free) for _ in range(-(-context // BLOCK_SIZE_TOKENS) + 1))
            prompt = tuple(i % self.spec.vocab_size for i in range(number, number + context))
            rows.append(
                Row(
                    sequence_id=number,
                    run=0,
                    start=context - 1,
                    num_tokens=1,
                    token_ids=prompt[-1:],
                    block_updates=(BlockUpdate(0, blocks),),
                    first_stage=0,
                    end_stage=1,
                    sample_positions=(context - 1,),
                    state=SequenceState(prompt, (), sampling, context + BLOCK_SIZE_TOKENS, adapter),
                )
            )
        return Decode(self, rows)

    def execute(self, rows: Sequence[Row]) -> tuple[RowResult, ...]:
        self._num_steps += 1
        step = Step(PIPELINE, Epoch(1, 1), self._num_steps, tuple(rows))
        return self.executor.execute(step, b"", "").rows


class Decode:
    """One step, to be taken any number of times."""

    def __init__(self, stage: LoneStage, rows: Sequence[Row]) -> None:
        self._stage = stage
        stage.execute(rows)  # the stage learns of the sequences
        self._rows = [_again(row) for row in rows]

    def take_s(self) -> float:
        """Seconds that the step took."""
        started_s = time.perf_counter()
        results = self._stage.execute(self._rows)
        took_s = time.perf_counter() - started_s
        assert all(result.error is None for result in results)
        return took_s


def _again(row: Row) -> Row:
    """As a step plans it for a sequence that is known."""
    return Row(
        sequence_id=row.sequence_id,
        run=row.run,
        start=row.start,
        num_tokens=row.num_tokens,
        token_ids=row.token_ids,
        block_updates=(),
        first_stage=row.first_stage,
        end_stage=row.end_stage,
        sample_positions=row.sample_positions,
    )


@torch.inference_mode()
def _fill(cache: KvCache, spec: ModelSpec) -> None:
    """Random numbers, in whatever type the cache holds them."""
    slots = torch.arange(cache.num_blocks * cache.block_size_tokens)
    for layer in range(spec.num_layers):
        for some in slots.split(1024):
            size = (len(some), spec.num_kv_heads, spec.head_dim)
            cache.write(layer, some, torch.randn(size), torch.randn(size))
