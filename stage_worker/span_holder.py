"""The span of layers that a worker holds: loaded, replaced and dropped on the device thread.

The numerics, and torch with them, are imported by the device thread when it first needs them; the
event loop answers meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stage_worker.device_thread import DeviceThread
from stage_worker.executor_config import ExecutorConfig, ExecutorFacts
from stage_worker.host_memory import available_host_bytes
from stage_worker.load_watch import LoadProgress
from stage_worker.options import WorkerOptions
from stage_worker.rank_processes import RankProcesses
from stage_worker.step_cost import StepCost
from stagemesh.errors import CheckpointError, RequestCancelled
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import ModelSummary, Span
from stagemesh.quantization import parse_quantization

if TYPE_CHECKING:
    from stage_worker.collectives import Group
    from stage_worker.executor import StageExecutor
    from stage_worker.identity import FileStamps
    from stage_worker.linear_schemes import Numerics
    from stage_worker.ranked_stage import RankedStage

PROGRESS_INTERVAL_NS = 100_000_000

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class HeldSpan:
    """A span that is ready to execute."""

    span: Span
    facts: ExecutorFacts
    executor: StageExecutor | RankedStage
    cost: StepCost


class SpanHolder:
    """Holds one span at most."""

    def __init__(
        self,
        options: WorkerOptions,
        dtype: str,
        device: DeviceThread,
        ranks: RankProcesses | None = None,
    ) -> None:
        self._options = options
        self._ranks = ranks
        self._group: Group | None = None
        self.load_progress = LoadProgress() if ranks is None else ranks.load_progress
        self._dtype = dtype
        self._device = device
        self.held: HeldSpan | None = None
        # Identities by name, once `summarise` has told them.
        self.adapters: dict[str, str] = {}
        self._stamps: FileStamps = ()
        self._device_bytes = 0  # as last measured, by the device thread

    def available_bytes(self) -> int:
        """Memory that could be allocated for layers; on a GPU, when layers were last loaded."""
        return available_host_bytes() if self._options.device == "cpu" else self._device_bytes

    async def summarise(self) -> ModelSummary:
        """What this worker says of its model; what it loads later is of the same files.

        Raises CheckpointError and what else is wrong with the files.
        """
        return await self._device.run(self._summarise)

    async def load(self, span: Span, on_progress: OnProgress) -> HeldSpan:
        """Replaces what is held by `span`; `on_progress(loaded_bytes, total_bytes)` is called from
        the device thread, several times a second.

        Raises what is wrong with the files, the span, or the memory; then nothing is held.
        """
        if self.held is not None and self.held.span == span:
            await self._device.run(self.held.executor.forget)
            return self.held
        self.held = None
        report = _Throttled(on_progress, self._device, self.load_progress)
        self.held = await self._device.run(lambda: self._load(span, report))
        return self.held

    def _summarise(self) -> ModelSummary:
        from stage_worker.adapter_files import checked_identity
        from stage_worker.identity import summarise

        self._stamps = self._file_stamps()  # first: a change meanwhile counts too
        self._measure()
        spec = ModelSpec.from_directory(self._options.model)
        dirs = self._options.adapter_dirs()
        self.adapters = {name: checked_identity(path, spec) for name, path in dirs.items()}
        return summarise(self._options.model, _numerics(self._options, self._dtype))

    def _load(self, span: Span, on_progress: OnProgress) -> HeldSpan:
        self.load_progress.begin(0)
        try:
            return self._load_anew(span, on_progress)
        finally:
            self.load_progress.end(0)

    def _load_anew(self, span: Span, on_progress: OnProgress) -> HeldSpan:
        gc.collect()  # what was held before may hang in cycles, and its memory is wanted
        dirs = self._options.adapter_dirs()
        adapters = {identity: dirs[name] for name, identity in self.adapters.items()}
        config = _config(self._options, self._dtype, span, adapters)
        executor = self._executor(config, on_progress)
        held = HeldSpan(span, executor.facts, executor, StepCost(executor.spec, span))
        if self._file_stamps() != self._stamps:
            raise CheckpointError(
                f"files of {self._options.model} or of an adapter have changed since this worker "
                "told the mesh what they hold; start it again"
            )
        self._measure()
        return held

    def _executor(
        self, config: ExecutorConfig, on_progress: OnProgress
    ) -> StageExecutor | RankedStage:
        from stage_worker.executor import StageExecutor

        if self._ranks is None:
            return StageExecutor.load(config, on_progress)
        from stage_worker.ranked_stage import RankedStage

        if self._group is None:
            self._group = self._ranks.own.open_group()
        return RankedStage.load(config, on_progress, self._ranks, self._group)

    def _file_stamps(self) -> FileStamps:
        """Of the model's files, then of each adapter's."""
        from stage_worker.adapter_files import adapter_stamps
        from stage_worker.identity import file_stamps

        dirs = self._options.adapter_dirs().values()
        return file_stamps(self._options.model) + tuple(map(adapter_stamps, dirs))

    def _measure(self) -> None:
        if self._options.device != "cpu":
            import torch

            from stage_worker.memory import available_bytes

            with contextlib.suppress(RuntimeError, AssertionError):  # a device that is not there
                self._device_bytes = available_bytes(torch.device(self._options.device))


def _numerics(options: WorkerOptions, dtype: str) -> Numerics:
    import torch

    from stage_worker.checkpoint import TORCH_DTYPES
    from stage_worker.linear_schemes import Numerics

    return Numerics(
        TORCH_DTYPES[dtype],
        torch.device(options.device),
        parse_quantization(options.quantization),
        options.batch_invariant,
    )


def _config(
    options: WorkerOptions, dtype: str, span: Span, adapters: Mapping[str, Path]
) -> ExecutorConfig:
    return ExecutorConfig(
        model_dir=options.model,
        span=span,
        device=options.device,
        dtype=dtype,
        batch_invariant=options.batch_invariant,
        quantization=parse_quantization(options.quantization),
        block_size_tokens=options.block_size_tokens,
        max_kv_memory_bytes=options.max_kv_memory_bytes,
        num_blocks=options.num_blocks,
        max_log_memory_bytes=options.max_log_memory_bytes,
        wire_dtype=options.wire_dtype,
        lone_threads=options.lone_threads,
        kv_dtype=options.kv_dtype,
        expert_parallel=options.expert_parallel,
        redundant_experts=options.redundant_experts,
        adapters=adapters,
    )


class _Throttled:
    """Counts progress, passes it on now and then, ends a load that nobody waits for any more."""

    def __init__(
        self, on_progress: OnProgress, device: DeviceThread, progress: LoadProgress
    ) -> None:
        self._on_progress = on_progress
        self._device = device
        self._progress = progress
        self._last_ns = 0

    def __call__(self, loaded_bytes: int, total_bytes: int) -> None:
        self._progress.advance(0)
        if self._device.stopping:
            raise RequestCancelled("the worker stops")
        now_ns = time.monotonic_ns()
        if now_ns - self._last_ns >= PROGRESS_INTERVAL_NS or loaded_bytes == total_bytes:
            self._last_ns = now_ns
            self._on_progress(loaded_bytes, total_bytes)
