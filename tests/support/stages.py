"""Runs requests through a chain of stage executors in one process, by the simplest of plans."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from support.paths import DEMO_MODEL

from stage_worker.block_ranges import PipelineBlocks
from stage_worker.executor import ExecutorConfig, StageExecutor
from stage_worker.tenancy import Joining
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import (
    BlockUpdate,
    Epoch,
    Row,
    RowResult,
    SampledToken,
    SequenceRun,
    SequenceState,
    Span,
    Step,
)
from stagemesh.quantization import parse_quantization
from stagemesh.sampling import SamplingSpec

GREEDY = SamplingSpec(temperature=0.0, num_logprobs=2)
EPOCH = Epoch(1, 1)
NUM_DEMO_LAYERS = ModelSpec.from_directory(DEMO_MODEL).num_layers
WHOLE_DEMO = ExecutorConfig(
    model_dir=DEMO_MODEL,
    span=Span(0, NUM_DEMO_LAYERS),
    device="cpu",
    dtype="float32",
    batch_invariant=False,
    block_size_tokens=8,
    num_blocks=4,
)
"""The demo model as one stage, with little memory."""


def even_spans(num_layers: int, num_stages: int) -> list[Span]:
    bounds = [round(i * num_layers / num_stages) for i in range(num_stages + 1)]
    return [Span(a, b) for a, b in pairwise(bounds)]


@dataclass
class Wish:
    """A request of a test. `outputs` may hold tokens from before, as after a preemption."""

    prompt: list[int]
    max_tokens: int = 32
    sampling: SamplingSpec = GREEDY
    outputs: list[int] = field(default_factory=list)
    prompt_logprobs: bool = False
    adapter: str = ""


@dataclass
class Live:
    """A request under way: `tokens` are all that are known, [0, computed) have been executed."""

    sequence_id: int
    wish: Wish
    blocks: tuple[int, ...]
    tokens: list[int]
    run: int = 0
    computed: int = 0
    first: bool = True
    sampled: list[SampledToken] = field(default_factory=list)
    prompt_logprobs: list[SampledToken] = field(default_factory=list)
    error: str | None = None

    @property
    def total_length(self) -> int:
        return len(self.wish.prompt) + self.wish.max_tokens

    @property
    def done(self) -> bool:
        return self.error is not None or len(self.tokens) >= self.total_length

    @property
    def state(self) -> SequenceState:
        outputs = tuple(self.tokens[len(self.wish.prompt) :])
        wish = self.wish
        return SequenceState(
            tuple(wish.prompt), outputs, wish.sampling, self.total_length, wish.adapter
        )

    def rebuild_row(self, start: int, end: int, stages: range, first_writing_stage: int) -> Row:
        """Positions [start, end) again: from tokens on stage 0, else from the log before."""
        first = stages.start
        return Row(
            sequence_id=self.sequence_id,
            run=self.run,
            start=start,
            num_tokens=end - start,
            token_ids=() if first else tuple(self.tokens[start:end]),
            block_updates=(BlockUpdate(0, self.blocks),) if self.first else (),
            first_stage=first,
            end_stage=stages.stop,
            input_from_log_of_stage=first - 1 if first else None,
            state=self.state if self.first else None,
            first_writing_stage=first_writing_stage,
        )

    def row(self, num_stages: int, chunk: int | None) -> Row:
        waiting = len(self.tokens) - self.computed
        count = min(waiting, chunk or waiting)
        end = self.computed + count
        known = range(self.computed, min(end, len(self.wish.prompt) - 1))
        return Row(
            sequence_id=self.sequence_id,
            run=self.run,
            start=self.computed,
            num_tokens=count,
            token_ids=tuple(self.tokens[self.computed : end]),
            block_updates=(BlockUpdate(0, self.blocks),) if self.first else (),
            first_stage=0,
            end_stage=num_stages,
            sample_positions=(end - 1,) if end == len(self.tokens) else (),
            logprob_positions=tuple(known) if self.wish.prompt_logprobs else (),
            state=self.state if self.first else None,
        )

    def take(self, row: Row, result: RowResult) -> None:
        assert (result.sequence_id, result.run) == (row.sequence_id, row.run)
        self.first = False
        self.computed = row.start + row.num_tokens
        self.error = result.error
        self.sampled += result.sampled
        self.prompt_logprobs += result.prompt_logprobs
        self.tokens += [token.token_id for token in result.sampled]


def _ignore(loaded_bytes: int, total_bytes: int) -> None:
    pass


def _load(config: ExecutorConfig) -> StageExecutor:
    return StageExecutor.load(config, _ignore)


class Chain:
    """Stages in order, joined as one pipeline; blocks are handed out in a shuffled order.

    `from_end` says of each stage at which end of it the pipeline's blocks lie; `num_log_blocks`
    limits what is logged of them.
    """

    def __init__(
        self,
        model_dir: Path,
        num_stages: int = 1,
        *,
        dtype: str = "float32",
        batch_invariant: bool = False,
        block_size_tokens: int = 8,
        num_blocks: int = 512,
        device: str = "cpu",
        seed: int = 0,
        max_log_memory_bytes: int | None = None,
        pipeline_id: str = "p",
        wire_dtype: str = "auto",
        quantization: str = "auto",
        kv_dtype: str = "auto",
        load: Callable[[ExecutorConfig], StageExecutor] = _load,
        adapters: Mapping[str, Path] | None = None,
        expert_parallel: bool = False,
        redundant_experts: int = 0,
    ) -> None:
        self.pipeline_id = pipeline_id
        num_layers = ModelSpec.from_directory(model_dir).num_layers
        self.block_size_tokens, self.num_blocks = block_size_tokens, num_blocks
        self._configs = [
            ExecutorConfig(
                model_dir=model_dir,
                span=span,
                device=device,
                dtype=dtype,
                batch_invariant=batch_invariant,
                block_size_tokens=block_size_tokens,
                max_kv_memory_bytes=None,
                num_blocks=num_blocks,
                max_log_memory_bytes=max_log_memory_bytes,
                wire_dtype=wire_dtype,
                quantization=parse_quantization(quantization),
                kv_dtype=kv_dtype,
                adapters=adapters or {},
                expert_parallel=expert_parallel,
                redundant_experts=redundant_experts,
            )
            for span in even_spans(num_layers, num_stages)
        ]
        self.stages = [load(config) for config in self._configs]
        self.from_end = [False] * num_stages
        self.num_log_blocks: int | None = None
        self._begin(seed)

    def _begin(self, seed: int) -> None:
        self.free_blocks = list(range(self.num_blocks))
        random.Random(seed).shuffle(self.free_blocks)
        self.next_id = 0
        self.num_steps = 0
        self.join(keep_kv=False)

    def beside(self, pipeline_id: str, *, num_blocks: int, seed: int = 0) -> Chain:
        """Another pipeline of the same stages, with blocks from their ends."""
        other = copy.copy(self)
        other.pipeline_id, other.num_blocks = pipeline_id, num_blocks
        other.stages, other.from_end = list(self.stages), [True] * len(self.stages)
        other._begin(seed)
        return other

    def blocks(self, stage: int) -> PipelineBlocks:
        facts = self.stages[stage].facts
        num_logged = facts.num_log_blocks
        if self.num_log_blocks is not None:
            num_logged = min(self.num_log_blocks, num_logged)
        from_end = self.from_end[stage]
        return facts.blocks_for(self.num_blocks, from_end=from_end, num_log_blocks=num_logged)

    def join(self, *, keep_kv: bool, lost: Sequence[int] = ()) -> None:
        for i, stage in enumerate(self.stages):
            stage.join(
                Joining(
                    pipeline_id=self.pipeline_id,
                    stage=i,
                    num_stages=len(self.stages),
                    blocks=self.blocks(i),
                    keep_kv=keep_kv and i not in lost,
                )
            )

    def resize(self, num_blocks: int, lost: Sequence[int] = ()) -> None:
        """What is valid of the pages stays so, but on stages that are lost."""
        self.num_blocks = num_blocks
        self.join(keep_kv=True, lost=lost)

    @torch.inference_mode()
    def lose(self, lost: Sequence[int]) -> list[StageExecutor]:
        """Replaces stages by fresh ones whose pages are rubbish; returns those that were lost."""
        gone = [self.stages[i] for i in lost]
        for i in lost:
            self.stages[i] = _load(self._configs[i])
            for pages in (*self.stages[i].cache.memory, self.stages[i].log.pages):
                pages.view(torch.uint8).fill_(255)  # NaN, as any of the types
        self.join(keep_kv=True, lost=lost)
        return gone

    def start(self, wish: Wish) -> Live:
        count = -(-(len(wish.prompt) + wish.max_tokens) // self.block_size_tokens)
        blocks = tuple(self.free_blocks.pop() for _ in range(count))
        self.next_id += 1
        return Live(self.next_id, wish, blocks, [*wish.prompt, *wish.outputs])

    def finish(self, live: Live) -> SequenceRun:
        self.free_blocks = [*live.blocks, *self.free_blocks]
        return SequenceRun(live.sequence_id, live.run)

    def execute(
        self, rows: Sequence[Row], forget: Sequence[SequenceRun] = ()
    ) -> tuple[RowResult, ...]:
        step = Step(self.pipeline_id, EPOCH, self.num_steps, tuple(rows), tuple(forget))
        self.num_steps += 1
        payload, dtype = memoryview(b""), ""
        for stage in self.stages:
            output = stage.execute(step, payload, dtype)
            payload, dtype = output.payload, output.dtype
        return output.rows

    def run(
        self,
        wishes: Sequence[Wish],
        *,
        chunk: int | None = None,
        max_rows: int = 1000,
        before_step: Callable[[list[Live]], None] = lambda alive: None,
    ) -> list[Live]:
        """All requests to their ends, `max_rows` at a time; others start as earlier ones end."""
        waiting, lives = list(wishes), []
        alive: list[Live] = []
        forget: list[SequenceRun] = []
        while waiting or alive:
            while waiting and len(alive) < max_rows:
                alive.append(self.start(waiting.pop(0)))
                lives.append(alive[-1])
            before_step(alive)
            rows = [live.row(len(self.stages), chunk) for live in alive]
            for live, row, result in zip(alive, rows, self.execute(rows, forget), strict=True):
                live.take(row, result)
            forget = [self.finish(live) for live in alive if live.done]
            alive = [live for live in alive if not live.done]
        self.execute([], forget)
        return lives
