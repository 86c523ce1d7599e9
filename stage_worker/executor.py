"""Executes the steps of a plan on one span of layers: a stage, without its process.

Every method runs on the device thread, synchronously. Knows nothing of streams, epochs or other
workers: order and epochs are checked before a step comes here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from stage_worker.batch import BatchBuilder, PlacedRow
from stage_worker.checkpoint import DTYPE_NAMES, TORCH_DTYPES
from stage_worker.decoder import Decoder
from stage_worker.kernels import choose_kernels
from stage_worker.kv_cache import KvCache, block_bytes, choose_num_blocks
from stage_worker.memory import available_bytes, trim
from stage_worker.payload import bytes_view, hidden_from_bytes
from stage_worker.results import RowSampler
from stage_worker.rope import inverse_frequencies
from stage_worker.sequences import SequenceTable
from stage_worker.weights import WeightLoader, span_bytes
from stagemesh.errors import ConfigError, OutOfMemory, ProtocolError
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import Row, RowResult, Span, Step


@dataclass(frozen=True, slots=True)
class ExecutorConfig:
    """`dtype` may be "auto". KV: `num_blocks` where given, else what fits the memory."""

    model_dir: Path
    span: Span
    device: str
    dtype: str
    batch_invariant: bool
    block_size_tokens: int
    max_kv_memory_bytes: int | None = None
    num_blocks: int | None = None


@dataclass(frozen=True, slots=True)
class ExecutorFacts:
    """Found out while loading. `weight_bytes` is of the tensors in the dtype computed with."""

    num_blocks: int
    block_size_tokens: int
    weight_bytes: int
    kv_block_bytes: int
    load_ns: int


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


def resolve_dtype(dtype: str, spec: ModelSpec, batch_invariant: bool) -> str:
    """The dtype that "auto" stands for: the files' own, or float32 where `batch_invariant`."""
    if dtype == "auto":
        return "float32" if batch_invariant else spec.dtype
    if dtype not in TORCH_DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(TORCH_DTYPES)}, not {dtype!r}")
    return dtype


class StageExecutor:
    """One stage. `load` makes it, `join` gives it its place, `execute` takes steps in order."""

    def __init__(
        self, spec: ModelSpec, span: Span, decoder: Decoder, cache: KvCache, facts: ExecutorFacts
    ) -> None:
        self.spec = spec
        self.facts = facts
        self.cache = cache
        self._span = span
        self._decoder = decoder
        self._dtype, self._device = cache.keys[0].dtype, cache.keys[0].device
        self._table = SequenceTable(facts.block_size_tokens, spec.vocab_size, self._device)
        windows = spec.layer_windows[span.start : span.end]
        self._batches = BatchBuilder(windows, spec.rope, decoder.attention_tile, self._dtype)
        self._sampler = RowSampler(decoder.logits)
        self._stage, self._num_stages, self._num_blocks = 0, 0, 0

    @classmethod
    @torch.inference_mode()
    def load(cls, config: ExecutorConfig, on_progress: Callable[[int, int], None]) -> StageExecutor:
        """Loads the span; `on_progress(loaded_bytes, total_bytes)` is called all along.

        Raises ConfigError, CheckpointError, UnsupportedModel, SpanError, OutOfMemory.
        """
        started_ns = time.monotonic_ns()
        spec = ModelSpec.from_directory(config.model_dir)
        dtype = TORCH_DTYPES[resolve_dtype(config.dtype, spec, config.batch_invariant)]
        device = _device(config.device)
        kernels = choose_kernels(config.batch_invariant, dtype, device)
        if config.block_size_tokens < 1:
            raise ConfigError(f"block_size must be at least 1, not {config.block_size_tokens}")
        weight_bytes = span_bytes(spec, config.span, dtype.itemsize)
        _check_fits(weight_bytes, device)
        progress = _Progress(weight_bytes, on_progress)
        loader = WeightLoader(
            config.model_dir, spec, dtype, device, kernels.packed, progress.advance
        )
        try:
            weights = loader.load(config.span)
            trim()
            cache = _make_cache(spec, config, dtype, device)
        except (RuntimeError, MemoryError) as error:
            raise _as_out_of_memory(error) from error
        facts = ExecutorFacts(
            num_blocks=cache.num_blocks,
            block_size_tokens=config.block_size_tokens,
            weight_bytes=weight_bytes,
            kv_block_bytes=_block_bytes(spec, config, dtype),
            load_ns=time.monotonic_ns() - started_ns,
        )
        windows = spec.layer_windows[config.span.start : config.span.end]
        decoder = Decoder(spec, windows, weights, cache, kernels, dtype)
        return cls(spec, config.span, decoder, cache, facts)

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


class _Progress:
    def __init__(self, total_bytes: int, on_progress: Callable[[int, int], None]) -> None:
        self._loaded, self._total, self._on_progress = 0, total_bytes, on_progress

    def advance(self, num_bytes: int) -> None:
        self._loaded += num_bytes
        self._on_progress(min(self._loaded, self._total), self._total)


def _kept(hidden: torch.Tensor, placed: list[PlacedRow], next_stage: int) -> torch.Tensor:
    """The hidden states of the rows that go on to the next stage."""
    going = [entry for entry in placed if next_stage < entry.row.end_stage]
    if len(going) == len(placed):
        return hidden
    pieces = [hidden[entry.first : entry.first + entry.row.num_tokens] for entry in going]
    return torch.cat(pieces) if pieces else hidden[:0]


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda") and not name.startswith("cuda:"):
        raise ConfigError(f"device must be cpu or cuda, not {name!r}")
    if name != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: this torch finds no CUDA device")
    return torch.device(name)


def _check_fits(weight_bytes: int, device: torch.device) -> None:
    available = available_bytes(device)
    if weight_bytes > available:
        raise OutOfMemory(
            f"the span's weights take {weight_bytes} bytes, {available} are available on {device}"
        )


def _block_bytes(spec: ModelSpec, config: ExecutorConfig, dtype: torch.dtype) -> int:
    num_layers = config.span.num_layers
    return block_bytes(spec, num_layers, config.block_size_tokens, dtype.itemsize)


def _make_cache(
    spec: ModelSpec, config: ExecutorConfig, dtype: torch.dtype, device: torch.device
) -> KvCache:
    num_blocks = config.num_blocks
    if num_blocks is None:
        num_blocks = choose_num_blocks(
            spec,
            _block_bytes(spec, config, dtype),
            config.block_size_tokens,
            config.max_kv_memory_bytes,
            device,
        )
    size = config.block_size_tokens
    return KvCache(spec, config.span.num_layers, num_blocks, size, dtype, device)


def _as_out_of_memory(error: Exception) -> Exception:
    """torch says that memory ran out in words only, on the CPU."""
    told = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in told:
        return OutOfMemory(f"not enough memory to load the span: {told.splitlines()[0]}")
    return error
