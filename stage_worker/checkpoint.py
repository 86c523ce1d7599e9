"""Finds a model's tensors in its safetensors files, single or sharded, and gives views of them.

A view is backed by the mapped file: it takes no anonymous memory, and pages are read when they are
touched. Every way in which files can be wrong is a CheckpointError that names the file or tensor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stage_worker.layout import Shape
from stagemesh.errors import CheckpointError, UnsupportedModel

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# A file begins with the length of its header, which may be no longer than that.
_LENGTH_BYTES, _MAX_HEADER_BYTES = 8, 100_000_000
# As safetensors headers spell them.
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# What else holds weights that are quantised.
_CODE_DTYPES = ("I8", "U8", "I32", "I64", "F8_E4M3")


class Checkpoint:
    """The weights of one model directory. Files are opened when the first tensor is asked for."""

    def __init__(self, model_dir: Path) -> None:
        self._dir = model_dir
        self._file_of = _read_index(model_dir)
        self._open: dict[str, Any] = {}

    def file_of(self, name: str) -> Path:
        """The file that holds tensor `name`, whether or not it is there."""
        if self._file_of is None:
            return self._dir / SINGLE
        if name not in self._file_of:
            raise CheckpointError(f"{self._dir / INDEX} has no tensor {name}")
        return self._dir / self._file_of[name]

    def view(self, name: str, shape: Shape) -> Tensor:
        """The tensor of floats as stored, backed by the file; not to be written to.

        Raises CheckpointError where its file is missing or damaged, or it is not there or of
        another shape; UnsupportedModel where it is stored in a dtype that is not understood.
        """
        return self._view(name, shape, tuple(STORED_DTYPES))

    def codes(self, name: str, shape: Shape) -> Tensor:
        """As `view`, of a tensor that may hold codes as well."""
        return self._view(name, shape, (*STORED_DTYPES, *_CODE_DTYPES))

    def _view(self, name: str, shape: Shape, known: tuple[str, ...]) -> Tensor:
        reader = self._reader(self.file_of(name))
        found, stored = self._header(name)
        if found != shape:
            raise CheckpointError(
                f"{self.file_of(name)}: {name} has shape {list(found)}, config.json says "
                f"{list(shape)}"
            )
        if stored not in known:
            raise UnsupportedModel(f"{name} is stored as {stored}, which is not supported")
        tensor: Tensor = reader.get_tensor(name)
        return tensor

    def stored_dtype(self, name: str) -> str:
        """As safetensors spells it, such as "BF16"; errors as `view`."""
        return self._header(name)[1]

    def close(self) -> None:
        """Forgets the open files; they stay mapped for as long as a view of them lives."""
        self._open.clear()

    def _header(self, name: str) -> tuple[Shape, str]:
        path = self.file_of(name)
        try:
            header = self._reader(path).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path} has no tensor {name}") from error
        return tuple(header.get_shape()), str(header.get_dtype())

    def _reader(self, path: Path) -> Any:
        if path.name not in self._open:
            self._open[path.name] = open_safetensors(path)
        return self._open[path.name]


def _read_index(model_dir: Path) -> dict[str, str] | None:
    path = model_dir / INDEX
    if (model_dir / SINGLE).exists() or not path.exists():
        return None
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error


def open_safetensors(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        _await_header(path)
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut off: {error}") from error


def _await_header(path: Path) -> None:
    """Reads what opening the file reads. For as long as a disk takes, `safe_open` lets no other
    thread have the interpreter; here they go on."""
    with path.open("rb", buffering=0) as file:
        num_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        file.read(min(num_bytes, path.stat().st_size, _MAX_HEADER_BYTES))
