"""A pipeline of stage executors: one in this process, or each in a process of its own.

The executors are those of the stage worker, and a step goes through `StageExecutor.execute`; only
the streams between the processes are replaced, by pipes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from benchmarks.cuda_stage.plans import PIPELINE
from stagemesh.plan import RowResult, Span, Step


@dataclass(frozen=True, slots=True)
class StageConfig:
    model_dir: Path
    device: str
    num_blocks: int
    block_size_tokens: int


@dataclass(frozen=True, slots=True)
class Executed:
    """`stages_s`: how long each stage took, from a step's plan and input to its output."""

    rows: tuple[RowResult, ...]
    stages_s: tuple[float, ...]


class Pipeline(Protocol):
    @property
    def load_s(self) -> list[float]:
        """Until each worker could take steps, its imports left out."""
        ...

    def execute(self, step: Step) -> Executed: ...


class LocalStage:
    """All layers, in this process."""

    def __init__(self, config: StageConfig, num_layers: int) -> None:
        self._stage, load_s = _load(config, Span(0, num_layers))
        self.load_s = [load_s]
        _join(self._stage, 0, 1)

    def execute(self, step: Step) -> Executed:
        started_s = time.perf_counter()
        rows = self._stage.execute(step, b"", "").rows
        return Executed(rows, (time.perf_counter() - started_s,))


class StageProcesses:
    """Equal spans, each in a process; a step is sent through them one after another."""

    def __init__(self, config: StageConfig, num_layers: int, num_workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        bounds = [round(i * num_layers / num_workers) for i in range(num_workers + 1)]
        self._pipes: list[Connection] = []
        self._processes = []
        for i, (start, end) in enumerate(pairwise(bounds)):
            ours, theirs = context.Pipe()
            arguments = (theirs, config, Span(start, end), i, num_workers)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self.load_s = [pipe.recv() for pipe in self._pipes]

    def execute(self, step: Step) -> Executed:
        payload, dtype, rows, stages_s = b"", "", (), []
        for pipe in self._pipes:
            pipe.send((step, dtype))
            pipe.send_bytes(payload)
            dtype, rows, stage_s = pipe.recv()
            payload = pipe.recv_bytes()
            stages_s.append(stage_s)
        return Executed(rows, tuple(stages_s))

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(30)


@contextlib.contextmanager
def pipeline(config: StageConfig, num_layers: int, num_workers: int) -> Iterator[Pipeline]:
    if num_workers == 1:
        yield LocalStage(config, num_layers)
        return
    processes = StageProcesses(config, num_layers, num_workers)
    try:
        yield processes
    finally:
        processes.close()


def _load(config: StageConfig, span: Span):  # type: ignore[no-untyped-def]
    from stage_worker.executor import ExecutorConfig, StageExecutor

    started_s = time.perf_counter()
    stage = StageExecutor.load(
        ExecutorConfig(
            model_dir=config.model_dir,
            span=span,
            device=config.device,
            dtype="auto" if config.device != "cpu" else "float32",
            batch_invariant=False,
            block_size_tokens=config.block_size_tokens,
            num_blocks=config.num_blocks,
        ),
        lambda loaded, total: None,
    )
    return stage, time.perf_counter() - started_s


def _join(stage, place: int, num_stages: int) -> None:  # type: ignore[no-untyped-def]
    from stage_worker.tenancy import Joining

    blocks = stage.facts.blocks_for(stage.facts.num_blocks)
    stage.join(Joining(pipeline_id=PIPELINE, stage=place, num_stages=num_stages, blocks=blocks))


def _serve(pipe: Connection, config: StageConfig, span: Span, stage: int, num_stages: int) -> None:
    executor, load_s = _load(config, span)
    _join(executor, stage, num_stages)
    pipe.send(load_s)
    while (message := pipe.recv()) is not None:
        step, dtype = message
        payload = pipe.recv_bytes()
        started_s = time.perf_counter()
        output = executor.execute(step, payload, dtype)
        pipe.send((output.dtype, output.rows, time.perf_counter() - started_s))
        pipe.send_bytes(output.payload)
