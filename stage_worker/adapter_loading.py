"""Loads what a stage needs of its adapters: the matrices of its own layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from stage_worker.adapter_files import AdapterFiles, adaptable, slot_modules
from stage_worker.layout import Shape
from stage_worker.lora import Adapter, SlotDelta, StageAdapters
from stage_worker.sharding import Part, Shards, num_outputs
from stagemesh.errors import ConfigError
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import Span


class AdapterLoader:
    """`directories` by identity. Opens and checks them all; loads what `shards` have of them.

    Raises CheckpointError, UnsupportedModel; ConfigError on a device that cannot have adapters.
    """

    def __init__(
        self,
        directories: Mapping[str, Path],
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device,
        shards: Shards | None = None,
    ) -> None:
        if directories and device.type != "cpu":
            raise ConfigError(f"--adapter needs --device cpu: {device} has no kernels for it")
        self._files = {each: AdapterFiles(path, spec) for each, path in directories.items()}
        self._spec = spec
        self._shards = shards or Shards(spec)
        self._dtype = dtype

    def span_bytes(self, span: Span) -> int:
        """What `load` of the same span will take."""
        return sum(
            files.pair_bytes(module, self._dtype, self._parts(module, shape))
            for files in self._files.values()
            for layer in range(span.start, span.end)
            for module, shape in adaptable(self._spec, layer).items()
        )

    def load(
        self, span: Span, on_bytes: Callable[[int], None], *, one_by_one: bool
    ) -> StageAdapters:
        """Closes the files; `on_bytes` is told of memory as it is filled."""
        adapters: dict[str, Adapter] = {}
        for identity, files in self._files.items():
            layers = []
            for layer in range(span.start, span.end):
                layers.append(self._layer(files, layer))
                on_bytes(sum(delta.nbytes for delta in layers[-1].values()))
            adapters[identity] = Adapter(tuple(layers))
        self._files = {}
        return StageAdapters(adapters, one_by_one=one_by_one)

    def _layer(self, files: AdapterFiles, layer: int) -> dict[str, SlotDelta]:
        modules = slot_modules(self._spec, layer)
        slots = {slot: self._slot(files, shapes) for slot, shapes in modules.items()}
        return {slot: delta for slot, delta in slots.items() if delta is not None}

    def _slot(self, files: AdapterFiles, modules: Mapping[str, Shape]) -> SlotDelta | None:
        """As `shards` have the model's matrices. Of what is split by outputs: all of A, and their
        rows of B. Of what is split by inputs: their columns of A, and all of B, and what they add
        is summed over the ranks with what the layer gives."""
        parts = {name: self._parts(name, shape) for name, shape in modules.items()}
        pairs = [files.pair(name, self._dtype, parts[name]) for name in modules]
        if not any(pairs):
            return None
        sizes = [num_outputs(parts[name], shape[0]) for name, shape in modules.items()]
        return SlotDelta(pairs, sizes)

    def _parts(self, module: str, shape: Shape) -> list[Part]:
        return self._shards.parts(f"{module}.weight", shape)
