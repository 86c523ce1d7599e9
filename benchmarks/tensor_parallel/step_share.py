"""Share of a decode step that a rank spends in all-reduces, waiting for other ranks included."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from torch import Tensor

from benchmarks.lone_stage import GREEDY
from benchmarks.stages import BLOCK_SIZE_TOKENS, PIPELINE
from stage_worker.collectives import Group
from stage_worker.executor import ExecutorConfig
from stage_worker.rank_processes import RankProcesses
from stage_worker.ranked_stage import RankedStage
from stage_worker.tenancy import Joining
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import BlockUpdate, Epoch, Row, SequenceState, Span, Step
from stagemesh.quantization import parse_quantization

_NUM_STEPS = 20
_NUM_WARM_UP = 4


@dataclass(frozen=True, slots=True)
class Share:
    ranks: int
    quantization: str
    batch: int
    step_ms: float
    reduce_share: float


class TimedGroup:
    """A group that counts the seconds that all-reduces took."""

    def __init__(self, group: Group) -> None:
        self.rank, self.size = group.rank, group.size
        self.seconds = 0.0
        self._group = group

    def all_reduce(self, x: Tensor) -> Tensor:
        started_s = time.perf_counter()
        summed = self._group.all_reduce(x)
        self.seconds += time.perf_counter() - started_s
        return summed

    def all_gather(self, x: Tensor) -> list[Tensor]:
        return self._group.all_gather(x)

    def gather(self, x: Tensor) -> list[Tensor] | None:
        return self._group.gather(x)


def measure(
    model_dir: Path,
    *,
    ranks: int,
    quantization: str,
    batches: Iterable[int],
    context: int,
    transport: str = "auto",
) -> Iterator[Share]:
    num_layers = ModelSpec.from_directory(model_dir).num_layers
    config = ExecutorConfig(
        model_dir=model_dir,
        span=Span(0, num_layers),
        device="cpu",
        dtype="float32",
        batch_invariant=False,
        block_size_tokens=BLOCK_SIZE_TOKENS,
        num_blocks=max(batches) * blocks_of(context),
        quantization=parse_quantization(quantization),
    )
    processes = RankProcesses(ranks, transport)
    try:
        group = TimedGroup(processes.own.open_group())
        stage = RankedStage.load(config, lambda loaded, total: None, processes, group)
        for batch in batches:
            times_s, reduce_s = _decode(stage, group, batch, context)
            share = reduce_s / sum(times_s)
            yield Share(ranks, quantization, batch, 1e3 * median(times_s), share)
    finally:
        processes.kill()


def _decode(
    stage: RankedStage, group: TimedGroup, batch: int, context: int
) -> tuple[list[float], float]:
    """(seconds of each step, seconds in all-reduces)"""
    blocks = stage.facts.blocks_for(stage.facts.num_blocks)
    stage.join(Joining(pipeline_id=PIPELINE, stage=0, num_stages=1, blocks=blocks))
    number = 0
    for row in range(batch):
        stage.execute(Step(PIPELINE, Epoch(1, 1), number, (prompt_row(row, context),)), b"", "")
        number += 1
    rows = tuple(token_row(row, context) for row in range(batch))
    times_s: list[float] = []
    for _ in range(_NUM_WARM_UP + _NUM_STEPS):
        if len(times_s) == _NUM_WARM_UP:
            group.seconds = 0.0
        started_s = time.perf_counter()
        stage.execute(Step(PIPELINE, Epoch(1, 1), number, rows), b"", "")
        times_s.append(time.perf_counter() - started_s)
        number += 1
    return times_s[_NUM_WARM_UP:], group.seconds


def blocks_of(context: int) -> int:
    return -(-context // BLOCK_SIZE_TOKENS)


def prompt_row(row: int, context: int) -> Row:
    prompt = tuple((row + i) % 1000 for i in range(context))
    first = row * blocks_of(context)
    return Row(
        sequence_id=row,
        run=0,
        start=0,
        num_tokens=context - 1,
        token_ids=prompt[:-1],
        block_updates=(BlockUpdate(0, tuple(range(first, first + blocks_of(context)))),),
        first_stage=0,
        end_stage=1,
        state=SequenceState(prompt, (), GREEDY, context + 1),
    )


def token_row(row: int, context: int) -> Row:
    return Row(
        sequence_id=row,
        run=0,
        start=context - 1,
        num_tokens=1,
        token_ids=((row + context - 1) % 1000,),
        block_updates=(),
        first_stage=0,
        end_stage=1,
        sample_positions=(context - 1,),
    )
