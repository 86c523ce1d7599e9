"""An adapter's tensors in its safetensors file: checked against the model, read layer by layer.

    R rank; I inputs, O outputs of a matrix of the model

PEFT names a layer's pair `base_model.model.<module>.lora_A.weight` [R, I] and `…lora_B.weight`
[O, R], and the module computes W x + scaling * B A x.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage_worker.adapter_config import AdapterConfig
from stage_worker.checkpoint import STORED_DTYPES, open_safetensors
from stage_worker.layout import Shape, layer_tensors
from stage_worker.lora import SLOTS, Pair
from stage_worker.sharding import Part, num_outputs
from stage_worker.weight_names import names_of
from stagemesh.adapters import CONFIG
from stagemesh.errors import CheckpointError, UnsupportedModel
from stagemesh.model_spec import ModelSpec

TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SLICE_BYTES = 2**22


def adapter_identity(directory: Path) -> str:
    """Hash of what the config means and of the file of tensors: equal where numbers are.

    Raises CheckpointError, UnsupportedModel.
    """
    config = AdapterConfig.from_directory(directory)
    meaning = json.dumps(asdict(config), sort_keys=True)
    digest = hashlib.blake2b(meaning.encode(), digest_size=16, person=b"lora adapter")
    try:
        with (directory / TENSORS).open("rb") as file:
            while piece := file.read(_SLICE_BYTES):
                digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"{directory / TENSORS} cannot be read: {error}") from error
    return digest.hexdigest()


def slot_modules(spec: ModelSpec, layer: int) -> dict[str, dict[str, Shape]]:
    """Modules, in full, and shapes [O, I] of what lies in each slot of a layer, in order. The
    experts of a mixture are no slot's.
    """
    shapes = layer_tensors(spec, layer)
    return {
        slot: {name.removesuffix(".weight"): shapes[name] for name in names_of(spec, layer, *held)}
        for slot, held in SLOTS.items()
    }


def adaptable(spec: ModelSpec, layer: int) -> dict[str, Shape]:
    """Of all slots."""
    slots = slot_modules(spec, layer).values()
    return {module: shape for modules in slots for module, shape in modules.items()}


def checked_identity(directory: Path, spec: ModelSpec) -> str:
    """The identity of an adapter that fits the model. Raises what AdapterFiles does."""
    AdapterFiles(directory, spec)
    return adapter_identity(directory)


def adapter_stamps(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and modification time of the files that are there."""
    paths = [path for path in (directory / CONFIG, directory / TENSORS) if path.is_file()]
    status = [(path.name, path.stat()) for path in paths]
    return tuple((name, each.st_size, each.st_mtime_ns) for name, each in status)


@dataclass(frozen=True, slots=True)
class _Header:
    shape: Shape
    dtype: str


class AdapterFiles:
    """One adapter, opened: its tensors are those that the config and the model have it hold.

    Raises CheckpointError where it is damaged or does not fit the model, UnsupportedModel where it
    changes what is not supported; both before any tensor is read.
    """

    def __init__(self, directory: Path, spec: ModelSpec) -> None:
        self._path = directory / TENSORS
        self._config = AdapterConfig.from_directory(directory)
        self._spec = spec
        self._file: Any = open_safetensors(self._path)
        self._headers = {name: self._header(name) for name in self._file.keys()}  # noqa: SIM118
        self._check()

    def pair_bytes(self, module: str, dtype: torch.dtype, parts: Sequence[Part]) -> int:
        """What `pair` of the same arguments takes in memory."""
        a, b = (self._headers.get(_tensor(module, side)) for side in "AB")
        if a is None or b is None:
            return 0
        rank, num_inputs = a.shape
        num_numbers = len(range(num_inputs)[parts[0].columns]) + num_outputs(parts, b.shape[0])
        return dtype.itemsize * rank * num_numbers

    def pair(self, module: str, dtype: torch.dtype, parts: Sequence[Part]) -> Pair | None:
        """The matrices of a module such as "model.layers.0.mlp.up_proj", the scaling in the second;
        None where the module is not adapted. `parts` of the module's own matrix are wanted, which
        have the same inputs: views of the file are cut, and only what is left of them is read.
        """
        if _tensor(module, "A") not in self._headers:
            return None
        a, b = (self._file.get_tensor(_tensor(module, side)) for side in "AB")
        a = a[:, parts[0].columns]
        b = torch.cat([b[part.rows] for part in parts])
        scaled: Tensor = b.to(torch.float32) * self._config.scaling(module)
        return Pair(a.to(dtype, copy=True).contiguous(), scaled.to(dtype).contiguous())

    # ---- what may be wrong ---------------------------------------------------------------------

    def _header(self, name: str) -> _Header:
        header = self._file.get_slice(name)
        return _Header(tuple(header.get_shape()), str(header.get_dtype()))

    def _check(self) -> None:
        wanted = self._wanted()
        if not wanted:
            raise CheckpointError(f"{self._path}: its config's target_modules are in no layer here")
        for name in self._headers.keys() - wanted.keys():
            self._refuse(name)
        for name, shape in wanted.items():
            header = self._headers.get(name)
            if header is None:
                raise CheckpointError(f"{self._path} lacks {name}, which its config says it has")
            if header.shape != shape:
                raise CheckpointError(
                    f"{self._path}: {name} has shape {list(header.shape)}; by the model and the "
                    f"config's rank it would be {list(shape)}"
                )
            if header.dtype not in STORED_DTYPES:
                raise UnsupportedModel(f"{self._path}: {name} is stored as {header.dtype}")

    def _wanted(self) -> dict[str, Shape]:
        """Names and shapes of the tensors that the config tells of."""
        wanted: dict[str, Shape] = {}
        for layer in range(self._spec.num_layers):
            for module, (num_out, num_in) in adaptable(self._spec, layer).items():
                if self._config.changes(module, layer):
                    rank = self._config.rank_of(module)
                    wanted[_tensor(module, "A")] = (rank, num_in)
                    wanted[_tensor(module, "B")] = (num_out, rank)
        return wanted

    def _refuse(self, name: str) -> None:
        modules = [m for i in range(self._spec.num_layers) for m in adaptable(self._spec, i)]
        if any(name in (_tensor(module, "A"), _tensor(module, "B")) for module in modules):
            raise CheckpointError(
                f"{self._path} has {name}, which its config does not tell of (target_modules, "
                "exclude_modules, layers_to_transform)"
            )
        known = ", ".join(dict.fromkeys(module.split(".")[-1] for module in modules))
        raise UnsupportedModel(
            f"{self._path}: {name} is of nothing that adapters may change here ({known} of the "
            f"model's {self._spec.num_layers} layers)"
        )


def _tensor(module: str, side: str) -> str:
    return f"{_PREFIX}{module}.lora_{side}.weight"
