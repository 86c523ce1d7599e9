"""Executes the steps of a plan on one span of layers: a stage, without its process.

Every method runs on the device thread, synchronously. Knows nothing of streams, epochs or other
workers: order and epochs are checked before a step comes here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from stage_worker.batch import BatchBuilder, PlacedRow
from stage_worker.checkpoint import DTYPE_NAMES
from stage_worker.loading import ExecutorConfig, ExecutorFacts, LoadedStage, load_stage
from stage_worker.payload import bytes_view, hidden_from_bytes
from stage_worker.results import RowSampler
from stage_worker.rope import inverse_frequencies
from stage_worker.sequences import SequenceTable
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


class StageExecutor:
    """One stage. `load` makes it, `join` gives it its place, `execute` takes steps in order."""

    def __init__(self, loaded: LoadedStage) -> None:
        self.spec = loaded.spec
        self.facts = loaded.facts
        self.cache = loaded.cache
        self._span = loaded.span
        self._decoder = loaded.decoder
        pages = loaded.cache.keys[0]
        self._dtype, self._device = pages.dtype, pages.device
        self._table = SequenceTable(
            loaded.facts.block_size_tokens, self.spec.vocab_size, self._device
        )
        windows = self.spec.layer_windows[self._span.start : self._span.end]
        tile = self._decoder.attention_tile
        self._batches = BatchBuilder(windows, self.spec.rope, tile, self._dtype)
        self._sampler = RowSampler(self._decoder.logits)
        self._stage, self._num_stages, self._num_blocks = 0, 0, 0

    @classmethod
    @torch.inference_mode()
    def load(cls, config: ExecutorConfig, on_progress: Callable[[int, int], None]) -> StageExecutor:
        """A stage as `stage_worker.loading.load_stage` loads it, with its errors."""
        return cls(load_stage(config, on_progress))

    @property
    def dtype(self) -> str:
        """What weights, KV and hidden states on the wire are in."""
        return DTYPE_NAMES[self._dtype]

    @property
    def num_sequences(self) -> int:
        return len(self._table)

    def join(self, *, stage: int, num_stages: int, num_blocks: int, keep_kv: bool) -> None:
        """Takes the stage's place in a pipeline whose blocks are [0, num_blocks).

        Without `keep_kv` all sequences are forgotten. Raises ProtocolError.
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

    @torch.inference_mode()
    def execute(
        self, step: Step, payload: bytes | bytearray | memoryview, payload_dtype: str
    ) -> StageOutput:
        """Executes the rows that concern this stage.

        `payload` holds the hidden states of those that began on an earlier one. Raises
        ProtocolError where the plan does not fit what this stage holds.
        """
        for gone in step.forget:
            self._table.forget(gone)
        placed = self._place(step)
        num_tokens = sum(entry.row.num_tokens for entry in placed)
        hidden = self._input(placed, num_tokens, payload, payload_dtype)
        if placed:
            hidden = self._decoder.forward(hidden, self._batches.build(placed))
        if self._stage + 1 == self._num_stages:
            return self._output(hidden[:0], self._sampler.results(step, placed, hidden))
        return self._output(_kept(hidden, placed, self._stage + 1), ())

    def _place(self, step: Step) -> list[PlacedRow]:
        if not self._num_stages:
            raise ProtocolError("a step came before this stage joined an epoch")
        placed = []
        first_token = 0
        for row in step.rows:
            if not row.first_stage <= self._stage < row.end_stage:
                continue
            self._check_input(row)
            frequencies = None
            if row.state is not None:
                frequencies = inverse_frequencies(
                    self.spec.rope, self.spec.head_dim, row.state.total_length
                ).to(self._device)
            sequence = self._table.update(row, self._num_blocks, frequencies)
            placed.append(PlacedRow(row, sequence, first_token))
            first_token += row.num_tokens
        return placed

    def _check_input(self, row: Row) -> None:
        if row.input_from_log_of_stage is not None or 0 < row.first_stage == self._stage:
            raise ProtocolError("rows whose input comes from a stage's log are not supported")
        if row.first_stage == self._stage and len(row.token_ids) != row.num_tokens:
            raise ProtocolError(
                f"sequence {row.sequence_id}: {len(row.token_ids)} token ids for {row.num_tokens} "
                "positions"
            )

    def _input(
        self,
        placed: list[PlacedRow],
        num_tokens: int,
        payload: bytes | bytearray | memoryview,
        payload_dtype: str,
    ) -> torch.Tensor:
        hidden_size = self.spec.hidden_size
        if self._stage > 0:
            shape = (num_tokens, hidden_size)
            return hidden_from_bytes(payload, payload_dtype, shape, self._dtype, self._device)
        if not placed:
            return torch.empty(0, hidden_size, dtype=self._dtype, device=self._device)
        token_ids = [token for entry in placed for token in entry.row.token_ids]
        return self._decoder.embed(torch.tensor(token_ids, device=self._device))

    def _output(self, hidden: torch.Tensor, rows: tuple[RowResult, ...]) -> StageOutput:
        return StageOutput(
            payload=bytes_view(hidden),
            num_tokens=len(hidden),
            hidden_size=self.spec.hidden_size,
            dtype=self.dtype,
            rows=rows,
        )


def _kept(hidden: torch.Tensor, placed: list[PlacedRow], next_stage: int) -> torch.Tensor:
    """The hidden states of the rows that go on to the next stage."""
    going = [entry for entry in placed if next_stage < entry.row.end_stage]
    if len(going) == len(placed):
        return hidden
    pieces = [hidden[entry.first : entry.first + entry.row.num_tokens] for entry in going]
    return torch.cat(pieces) if pieces else hidden[:0]
