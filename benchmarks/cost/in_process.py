"""The stages of a model in one process, driven by hand: what there is without a mesh.

As many steps are under way as stages, each stage has a thread, and hidden states go from one to the
next in memory. Sequences decode only. Prints tokens per second as JSON.

    python -m benchmarks.cost.in_process MODEL --stages 2 --batch 8
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.stages import BLOCK_SIZE_TOKENS, PIPELINE, load_pipeline
from stage_worker.executor import StageExecutor
from stagemesh.plan import (
    BlockUpdate,
    Epoch,
    Row,
    RowResult,
    SequenceState,
    Step,
)
from stagemesh.sampling import SamplingSpec

_PROMPT = 8
_MAX_TOKENS = 2048


@dataclass
class Sequence:
    number: int
    num_computed: int = 0
    tokens: tuple[int, ...] = tuple(range(10, 10 + _PROMPT))

    def row(self, num_stages: int) -> Row:
        is_first = self.num_computed == 0
        num_blocks = _MAX_TOKENS // BLOCK_SIZE_TOKENS
        table = tuple(range(self.number * num_blocks, (self.number + 1) * num_blocks))
        state = SequenceState(self.tokens, (), SamplingSpec(temperature=0.0), _MAX_TOKENS)
        end = self.num_computed + len(self.tokens)
        row = Row(
            sequence_id=self.number,
            run=0,
            start=self.num_computed,
            num_tokens=len(self.tokens),
            token_ids=self.tokens,
            block_updates=(BlockUpdate(0, table),) if is_first else (),
            first_stage=0,
            end_stage=num_stages,
            sample_positions=(end - 1,),
            state=state if is_first else None,
        )
        self.num_computed = end
        return row

    def take(self, result: RowResult) -> None:
        self.tokens = (result.sampled[0].token_id,)


@dataclass
class Work:
    """A step on its way, with what the stage before made of it."""

    sequences: list[Sequence]
    step: Step
    payload: bytes | memoryview = b""
    dtype: str = ""


class Stages:
    def __init__(self, model: Path, num_stages: int, num_blocks: int) -> None:
        executors = load_pipeline(model, num_stages, num_blocks)
        self.done: queue.SimpleQueue[tuple[Work, tuple[RowResult, ...]]] = queue.SimpleQueue()
        self._queues: list[queue.SimpleQueue[Work | None]] = []
        self._threads: list[threading.Thread] = []
        for stage, executor in enumerate(executors):
            self._queues.append(queue.SimpleQueue())
            thread = threading.Thread(target=self._work, args=(stage, executor))
            self._threads.append(thread)
            thread.start()

    def send(self, work: Work) -> None:
        self._queues[0].put(work)

    def stop(self) -> None:
        for each in self._queues:
            each.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, stage: int, executor: StageExecutor) -> None:
        torch.set_num_threads(1)
        while (work := self._queues[stage].get()) is not None:
            output = executor.execute(work.step, work.payload, work.dtype)
            if stage + 1 < len(self._queues):
                passed = replace(work, payload=output.payload, dtype=output.dtype)
                self._queues[stage + 1].put(passed)
            else:
                self.done.put((work, output.rows))


def measure(model: Path, num_stages: int, batch: int, num_tokens: int, warm_up: int) -> float:
    """Tokens per second of all sequences together, from their `warm_up`th token on."""
    stages = Stages(model, num_stages, batch * _MAX_TOKENS // BLOCK_SIZE_TOKENS)
    sequences = [Sequence(number) for number in range(batch)]
    groups = [group for i in range(num_stages) if (group := sequences[i::num_stages])]
    number = 0

    def send(group: list[Sequence]) -> None:
        nonlocal number
        rows = tuple(each.row(num_stages) for each in group)
        stages.send(Work(group, Step(PIPELINE, Epoch(1, 1), number, rows)))
        number += 1

    for group in groups:
        send(group)
    started_s, num_counted = 0.0, 0
    for turn in range(num_tokens * len(groups)):
        work, results = stages.done.get()
        for sequence, result in zip(work.sequences, results, strict=True):
            sequence.take(result)
        if turn + 1 == warm_up * len(groups):
            started_s = time.perf_counter()
        elif started_s:
            num_counted += len(results)
        if turn < (num_tokens - 1) * len(groups):
            send(work.sequences)
    rate = num_counted / (time.perf_counter() - started_s)
    stages.stop()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--warm-up", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rate = measure(args.model, args.stages, args.batch, args.tokens, args.warm_up)
    print(json.dumps({"tokens_per_s": rate}))


if __name__ == "__main__":
    main()
