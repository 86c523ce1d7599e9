"""Executes the steps of a plan on one span of layers: a stage, without its process.

Every method runs on the device thread, synchronously. A stage takes over the state and the blocks
of every row, executes those that concern it, and logs what came of them; for a row whose input
comes from its log, it passes the logged hidden states on. It may serve two pipelines, each with
its blocks from one end of the pages. Knows nothing of streams, epochs or other workers: order and
epochs are checked before a step comes here.

    T tokens that are executed, E hidden size
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stage_worker.batch import PlacedRow
from stage_worker.boundary_log import BoundaryLog
from stage_worker.checkpoint import DTYPE_NAMES
from stage_worker.collectives import ALONE, Group
from stage_worker.executor_config import ExecutorConfig, ExecutorFacts
from stage_worker.loading import LoadedStage, load_stage
from stage_worker.pages import PageStore
from stage_worker.payload import check_wire_dtype, hidden_as_bytes, hidden_from_bytes
from stage_worker.results import RowSampler
from stage_worker.rope import all_frequencies
from stage_worker.sequences import Sequence, SequenceTable
from stage_worker.staging import to_host
from stage_worker.tenancy import Joining, Tenancy
from stage_worker.warm_up import warm_up
from stagemesh.errors import ProtocolError
from stagemesh.plan import Row, RowResult, Step

__all__ = ["ExecutorConfig", "ExecutorFacts", "StageExecutor", "StageOutput"]

# What is known of sequences beside their KV is on the host, whatever the device.
_HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class StageOutput:
    """`payload`: hidden states for the next stage, [num_tokens, hidden_size] in `dtype`, one row's
    after another's; empty where there are none. `rows` only on the last stage, one per row of the
    step.
    """

    payload: memoryview
    num_tokens: int
    hidden_size: int
    dtype: str
    rows: tuple[RowResult, ...]


@dataclass(frozen=True, slots=True)
class _Logged:
    """A row that passes this stage by and whose input the next one gets from these slots of the log
    here, [T]."""

    slots: Tensor


@dataclass(frozen=True, slots=True)
class _Work:
    """`executed` are rows to execute; `sent` are those that go on to the next stage, in order."""

    executed: list[PlacedRow]
    sent: list[PlacedRow | _Logged]


class StageExecutor:
    """One stage. `load` makes it, `join` gives it its place in a pipeline, `execute` takes that
    one's steps in order."""

    def __init__(self, loaded: LoadedStage) -> None:
        self.spec = loaded.spec
        self.facts = loaded.facts
        self.cache = loaded.cache
        self.log = loaded.log
        self.pages = PageStore(loaded.cache, loaded.log)
        self._span = loaded.span
        self._decoder = loaded.decoding.decoder
        self._batches = loaded.decoding.batches
        self._dtype, self._device = loaded.cache.dtype, loaded.cache.device
        # Whether another rank sends and answers what this one computes as well.
        self._follows = loaded.group.rank > 0
        self.wire_dtype = loaded.wire_dtype  # of hidden states that come and go
        self._threads = loaded.threads
        self._adapters = loaded.adapters
        self.experts = loaded.experts
        self._sampler = RowSampler(self._decoder.logits, self._decoder.greedy)
        # By whether its blocks are those from the end. Replaced, never changed: `num_sequences` is
        # asked by the event loop.
        self._tenancies: dict[bool, Tenancy] = {}

    @classmethod
    @torch.inference_mode()
    def load(
        cls,
        config: ExecutorConfig,
        on_progress: Callable[[int, int], None],
        group: Group = ALONE,
    ) -> StageExecutor:
        """A stage as `stage_worker.loading.load_stage` loads it, with its errors; warmed up."""
        executor = cls(load_stage(config, on_progress, group))
        warm_up(executor, config.span)
        executor.experts.forget_routing()
        return executor

    @property
    def dtype(self) -> str:
        """What is computed with."""
        return DTYPE_NAMES[self._dtype]

    @property
    def num_sequences(self) -> int:
        """Of all pipelines."""
        return sum(len(tenancy.sequences) for tenancy in self._tenancies.values())

    def join(self, joining: Joining) -> None:
        """Takes the stage's place in a pipeline.

        Sequences of another pipeline at this end are forgotten, and so are those of this one at the
        other. Pages never move: it is the plan that says what is valid of them. Raises
        ProtocolError.
        """
        self._check_place(joining)
        pipeline_id, blocks = joining.pipeline_id, joining.blocks
        held = self._tenancies.get(blocks.from_end)
        if joining.keep_kv and held is not None and held.pipeline_id == pipeline_id:
            sequences = held.sequences
            sequences.resize(blocks.kv)
        else:
            block_size = self.facts.block_size_tokens
            sequences = SequenceTable(blocks.kv, block_size, self.spec.vocab_size, _HOST)
        tenancy = Tenancy(pipeline_id, joining.stage, joining.num_stages, blocks, sequences)
        others = {
            end: other
            for end, other in self._tenancies.items()
            if end != blocks.from_end and other.pipeline_id != pipeline_id
        }
        self._tenancies = {**others, blocks.from_end: tenancy}

    def _check_place(self, joining: Joining) -> None:
        stage, num_stages = joining.stage, joining.num_stages
        first, last = self._span.start == 0, self._span.end == self.spec.num_layers
        if (
            not 0 <= stage < num_stages
            or (stage == 0) != first
            or (stage + 1 == num_stages) != last
        ):
            raise ProtocolError(
                f"layers [{self._span.start}, {self._span.end}) of {self.spec.num_layers} cannot "
                f"be stage {stage} of {num_stages}"
            )

    def forget(self) -> None:
        """Gives the stage's place in every pipeline up, and all sequences."""
        self._tenancies = {}

    @torch.inference_mode()
    def execute(
        self, step: Step, payload: bytes | bytearray | memoryview, payload_dtype: str
    ) -> StageOutput:
        """Executes the rows that concern this stage, in the pipeline of the step.

        `payload` holds the hidden states of those that began on an earlier one, or that begin here
        with what the stage before has logged. Raises ProtocolError where the plan does not fit
        what this stage holds.
        """
        tenancy = self._tenancy_of(step)
        self._threads.set_for(step)
        for gone in step.forget:
            tenancy.sequences.forget(gone)
        work = self._take_rows(step, tenancy)
        received = self._input(work.executed, tenancy.stage, payload, payload_dtype)
        hidden = torch.empty(0, self.spec.hidden_size, dtype=self._dtype)
        if work.executed:
            batch = self._batches.build(work.executed, tenancy.stage)
            hidden = self._decoder.forward(received, batch)
            if not tenancy.is_last:
                hidden = to_host(hidden)
                self.log.write(tenancy.log_slots(batch.slots), hidden)
        if tenancy.is_last:
            return self._output(hidden[:0], self._sampler.results(step, work.executed, hidden))
        if self._follows:
            return self._output(hidden[:0], ())
        return self._output(_joined(hidden, work, self.log), ())

    def _tenancy_of(self, step: Step) -> Tenancy:
        for tenancy in self._tenancies.values():
            if tenancy.pipeline_id == step.pipeline_id:
                return tenancy
        raise ProtocolError(
            f"a step of {step.pipeline_id} came before this stage joined an epoch of it"
        )

    def _take_rows(self, step: Step, tenancy: Tenancy) -> _Work:
        work = _Work([], [])
        first_token = 0
        for row in step.rows:
            sequence = self._take_row(row, tenancy)
            if row.first_stage <= tenancy.stage < row.end_stage:
                placed = PlacedRow(row, sequence, first_token)
                work.executed.append(placed)
                first_token += row.num_tokens
                if tenancy.stage + 1 < row.end_stage:
                    work.sent.append(placed)
            elif row.input_from_log_of_stage == tenancy.stage:
                work.sent.append(self._logged(row, sequence, tenancy))
        return work

    def _take_row(self, row: Row, tenancy: Tenancy) -> Sequence:
        """What every stage does with a row, whether it concerns it or not."""
        _check_stages(row, tenancy.num_stages)
        frequencies = None
        if row.state is not None:
            self._adapters.check(row.state.adapter)
            frequencies = all_frequencies(self.spec, row.state.total_length)
        return tenancy.sequences.update(row, frequencies)

    def _logged(self, row: Row, sequence: Sequence, tenancy: Tenancy) -> _Logged:
        slots = tenancy.log_slots(sequence.slots_of(row))
        if not self.log.holds(slots):
            raise ProtocolError(
                f"sequence {row.sequence_id}: stage {tenancy.stage} logs blocks "
                f"[0, {tenancy.blocks.log.num_blocks}), and others are asked for"
            )
        return _Logged(slots)

    def _input(
        self,
        executed: list[PlacedRow],
        stage: int,
        payload: bytes | bytearray | memoryview,
        payload_dtype: str,
    ) -> Tensor | None:
        """None on the first stage, whose input are the rows' tokens."""
        if stage == 0:
            return None
        shape = (sum(entry.row.num_tokens for entry in executed), self.spec.hidden_size)
        if executed:
            check_wire_dtype(payload_dtype, self.wire_dtype)
        return hidden_from_bytes(payload, self.wire_dtype, shape, self._dtype, self._device)

    def _output(self, hidden: Tensor, rows: tuple[RowResult, ...]) -> StageOutput:
        return StageOutput(
            payload=hidden_as_bytes(hidden, self.wire_dtype),
            num_tokens=len(hidden),
            hidden_size=self.spec.hidden_size,
            dtype=self.wire_dtype,
            rows=rows,
        )


def _check_stages(row: Row, num_stages: int) -> None:
    """Stages and input must fit together."""
    if not 0 <= row.first_stage < row.end_stage <= num_stages:
        raise ProtocolError(
            f"sequence {row.sequence_id}: stages [{row.first_stage}, {row.end_stage}) of "
            f"{num_stages}"
        )
    log_stage = row.first_stage - 1 if row.first_stage else None
    if row.input_from_log_of_stage != log_stage:
        raise ProtocolError(
            f"sequence {row.sequence_id}: stage {row.first_stage} cannot have its input from the "
            f"log of stage {row.input_from_log_of_stage}"
        )
    if len(row.token_ids) != (row.num_tokens if log_stage is None else 0):
        raise ProtocolError(
            f"sequence {row.sequence_id}: {len(row.token_ids)} token ids for {row.num_tokens} "
            f"positions from stage {row.first_stage} on"
        )


def _joined(hidden: Tensor, work: _Work, log: BoundaryLog) -> Tensor:
    """What goes on to the next stage, in the order of the rows. hidden: [T, E]."""
    if len(work.sent) == len(work.executed) and all(map(operator.is_, work.sent, work.executed)):
        return hidden
    pieces = [
        hidden[entry.first : entry.first + entry.row.num_tokens]
        if isinstance(entry, PlacedRow)
        else log.read(entry.slots)
        for entry in work.sent
    ]
    return torch.cat(pieces) if pieces else hidden[:0]
