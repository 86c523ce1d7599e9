"""Executes the steps of a plan on one span of layers: a stage, without its process.

Every method runs on the device thread, synchronously. A stage takes over the state and the blocks
of every row, executes those that concern it, and logs what came of them; for a row whose input
comes from its log, it passes the logged hidden states on. Knows nothing of streams, epochs or other
workers: order and epochs are checked before a step comes here.

    T tokens that are executed, E hidden size
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch

from stage_worker.batch import PlacedRow
from stage_worker.boundary_log import BoundaryLog
from stage_worker.checkpoint import DTYPE_NAMES
from stage_worker.loading import ExecutorConfig, ExecutorFacts, LoadedStage, load_stage
from stage_worker.pages import PageStore
from stage_worker.payload import bytes_view, hidden_from_bytes
from stage_worker.results import RowSampler
from stage_worker.rope import inverse_frequencies
from stage_worker.sequences import Sequence, SequenceTable
from stage_worker.staging import to_device, to_host
from stage_worker.warm_up import warm_up
from stagemesh.errors import ProtocolError
from stagemesh.plan import Row, RowResult, Step

__all__ = ["ExecutorConfig", "ExecutorFacts", "StageExecutor", "StageOutput"]


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
    """A row that passes this stage by and whose input the next one gets from the log here."""

    row: Row
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class _Work:
    """`executed` are rows to execute; `sent` are those that go on to the next stage, in order."""

    executed: list[PlacedRow]
    sent: list[PlacedRow | _Logged]


class StageExecutor:
    """One stage. `load` makes it, `join` gives it its place, `execute` takes steps in order."""

    def __init__(self, loaded: LoadedStage) -> None:
        self.spec = loaded.spec
        self.facts = loaded.facts
        self.cache = loaded.cache
        self.log = loaded.log
        self.pages = PageStore(loaded.cache, loaded.log)
        self._span = loaded.span
        self._decoder = loaded.decoding.decoder
        self._batches = loaded.decoding.batches
        keys = loaded.cache.keys[0]
        self._dtype, self._device = keys.dtype, keys.device
        self._table = SequenceTable(loaded.facts.block_size_tokens, self.spec.vocab_size)
        self._sampler = RowSampler(self._decoder.logits)
        self._stage, self._num_stages, self._num_blocks = 0, 0, 0

    @classmethod
    @torch.inference_mode()
    def load(cls, config: ExecutorConfig, on_progress: Callable[[int, int], None]) -> StageExecutor:
        """A stage as `stage_worker.loading.load_stage` loads it, with its errors; warmed up."""
        executor = cls(load_stage(config, on_progress))
        warm_up(executor, config.span)
        return executor

    @property
    def dtype(self) -> str:
        """What weights, KV and hidden states on the wire are in."""
        return DTYPE_NAMES[self._dtype]

    @property
    def item_bytes(self) -> int:
        """Of one number in that type."""
        return self._dtype.itemsize

    @property
    def num_sequences(self) -> int:
        return len(self._table)

    def join(self, *, stage: int, num_stages: int, num_blocks: int, keep_kv: bool) -> None:
        """Takes the stage's place in a pipeline whose blocks are [0, num_blocks).

        Without `keep_kv` all sequences are forgotten. Pages never move: it is the plan that says
        what is valid of them. Raises ProtocolError.
        """
        if not 0 < num_blocks <= self.facts.num_blocks:
            raise ProtocolError(
                f"the pipeline has {num_blocks} blocks, this stage {self.facts.num_blocks}"
            )
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
        if not keep_kv:
            self._table.clear()
        self._stage, self._num_stages, self._num_blocks = stage, num_stages, num_blocks

    def forget(self) -> None:
        """Gives the stage's place up, and all sequences."""
        self._table.clear()
        self._num_stages = 0

    @torch.inference_mode()
    def execute(
        self, step: Step, payload: bytes | bytearray | memoryview, payload_dtype: str
    ) -> StageOutput:
        """Executes the rows that concern this stage.

        `payload` holds the hidden states of those that began on an earlier one, or that begin here
        with what the stage before has logged. Raises ProtocolError where the plan does not fit
        what this stage holds.
        """
        for gone in step.forget:
            self._table.forget(gone)
        work = self._take_rows(step)
        num_tokens = sum(entry.row.num_tokens for entry in work.executed)
        hidden = self._input(work.executed, num_tokens, payload, payload_dtype)
        is_last = self._stage + 1 == self._num_stages
        if work.executed:
            batch = self._batches.build(work.executed, self._stage)
            hidden = self._decoder.forward(hidden, batch)
            if not is_last:
                hidden = to_host(hidden)
                self.log.write(batch.slots, hidden)
        if is_last:
            return self._output(hidden[:0], self._sampler.results(step, work.executed, hidden))
        return self._output(_joined(hidden, work, self.log), ())

    def _take_rows(self, step: Step) -> _Work:
        if not self._num_stages:
            raise ProtocolError("a step came before this stage joined an epoch")
        work = _Work([], [])
        first_token = 0
        for row in step.rows:
            sequence = self._take_row(row)
            entry: PlacedRow | _Logged = _Logged(row, sequence)
            if row.first_stage <= self._stage < row.end_stage:
                entry = PlacedRow(row, sequence, first_token)
                work.executed.append(entry)
                first_token += row.num_tokens
            if row.first_stage <= self._stage + 1 < row.end_stage:
                work.sent.append(entry)
        return work

    def _take_row(self, row: Row) -> Sequence:
        """What every stage does with a row, whether it concerns it or not."""
        _check_stages(row, self._num_stages)
        frequencies = None
        if row.state is not None:
            frequencies = inverse_frequencies(
                self.spec.rope, self.spec.head_dim, row.state.total_length
            )
        sequence = self._table.update(row, self._num_blocks, frequencies)
        from_log = row.input_from_log_of_stage == self._stage
        if from_log and not self.log.holds(sequence.slots_of(row)):
            raise ProtocolError(
                f"sequence {row.sequence_id}: stage {self._stage} logs blocks "
                f"[0, {self.log.num_blocks}), and others are asked for"
            )
        return sequence

    def _input(
        self,
        executed: list[PlacedRow],
        num_tokens: int,
        payload: bytes | bytearray | memoryview,
        payload_dtype: str,
    ) -> torch.Tensor:
        hidden_size = self.spec.hidden_size
        if self._stage > 0:
            shape = (num_tokens, hidden_size)
            return hidden_from_bytes(payload, payload_dtype, shape, self._dtype, self._device)
        if not executed:
            return torch.empty(0, hidden_size, dtype=self._dtype, device=self._device)
        token_ids = [token for entry in executed for token in entry.row.token_ids]
        staged = torch.tensor(token_ids, pin_memory=self._device.type == "cuda")
        return self._decoder.embed(to_device(staged, self._device))

    def _output(self, hidden: torch.Tensor, rows: tuple[RowResult, ...]) -> StageOutput:
        return StageOutput(
            payload=bytes_view(hidden),
            num_tokens=len(hidden),
            hidden_size=self.spec.hidden_size,
            dtype=self.dtype,
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


def _joined(hidden: torch.Tensor, work: _Work, log: BoundaryLog) -> torch.Tensor:
    """What goes on to the next stage, in the order of the rows. hidden: [T, E]."""
    if len(work.sent) == len(work.executed) and all(map(operator.is_, work.sent, work.executed)):
        return hidden
    pieces = [
        hidden[entry.first : entry.first + entry.row.num_tokens]
        if isinstance(entry, PlacedRow)
        else log.read(entry.sequence.slots_of(entry.row))
        for entry in work.sent
    ]
    return torch.cat(pieces) if pieces else hidden[:0]
