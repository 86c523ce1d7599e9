"""Who a model is: hashes of its parts, so that workers with different weights never form a mesh.

A part's hash covers names, shapes, stored dtypes and bytes of its tensors, as BLAKE2b. Reading a
large model takes a while, so hashes are kept in a small JSON file beside the weights, and are valid
for as long as name, size and modification time of the files they came from are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stage_worker.checkpoint import INDEX, Checkpoint
from stage_worker.layout import Shape, all_parts, part_tensors, part_weights
from stage_worker.linear_schemes import FLOAT32, Numerics
from stage_worker.weights import WeightLoader
from stagemesh.errors import CheckpointError
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import ModelSummary

CACHE_NAME = ".stagemesh-identity.json"
_CACHE_VERSION = 1
_SLICE_BYTES = 2**22

FileStamps = tuple[tuple[Any, ...], ...]


def summarise(model_dir: Path, numerics: Numerics = FLOAT32) -> ModelSummary:
    """The summary of the model in `model_dir`, hashing those parts whose files are all there.

    Sizes are of parts as they are held. Raises CheckpointError where a file that is there is
    damaged or does not fit config.json, or where no part is complete; ConfigError where `numerics`
    cannot be had.
    """
    spec = ModelSpec.from_directory(model_dir)
    hashes = _part_hashes(model_dir, spec)
    sizes = _part_sizes(model_dir, spec, numerics)
    return ModelSummary(
        name=model_dir.resolve().name,
        architecture=spec.architecture,
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        max_position=spec.context_length,
        layer_bytes=sizes["layer"],
        embedding_bytes=sizes["embedding"],
        head_bytes=sizes["head"],
        structure_hash=structure_hash(spec),
        part_hashes=hashes,
        dynamic_rope_length=spec.dynamic_rope_length,
    )


def file_stamps(model_dir: Path) -> FileStamps:
    """Name, size and modification time of every file that numbers come from."""
    paths = [model_dir / "config.json", model_dir / INDEX, *model_dir.glob("*.safetensors")]
    return tuple(tuple(_stamp(path)) for path in sorted(paths) if path.is_file())


def structure_hash(spec: ModelSpec) -> str:
    """Of what config.json means and of every tensor's name, shape and configured dtype.

    End tokens are left out: they are the gateway's business and change no number.
    """
    meaning = asdict(spec)
    del meaning["eos_token_ids"], meaning["bos_token_id"]
    tensors = {part: part_tensors(spec, part) for part in all_parts(spec)}
    text = json.dumps([meaning, tensors], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _part_hashes(model_dir: Path, spec: ModelSpec) -> dict[str, str]:
    files = Checkpoint(model_dir)
    cached = _read_cache(model_dir)
    hashes: dict[str, str] = {}
    stamps: dict[str, list[list[Any]]] = {}
    for part in all_parts(spec):
        tensors = part_tensors(spec, part)
        paths = sorted({files.file_of(name) for name in tensors})
        if not all(path.is_file() for path in paths):
            continue
        stamps[part] = [_stamp(path) for path in paths]
        known = cached.get(part)
        if known and known["files"] == stamps[part] and known["tensors"] == _names(tensors):
            hashes[part] = known["hash"]
        else:
            hashes[part] = _hash_part(files, tensors)
    if not hashes:
        raise CheckpointError(
            f"{model_dir} has no complete part of the model: its files are missing"
        )
    entries = {
        part: {"files": stamps[part], "tensors": _names(part_tensors(spec, part)), "hash": value}
        for part, value in hashes.items()
    }
    if entries != cached:
        _write_cache(model_dir, entries)
    return hashes


def _hash_part(files: Checkpoint, tensors: dict[str, Shape]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, shape in sorted(tensors.items()):
        view = files.codes(name, shape)
        digest.update(f"{name} {list(shape)} {files.stored_dtype(name)}\n".encode())
        content = view.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(content), _SLICE_BYTES):
            digest.update(content[start : start + _SLICE_BYTES])
    return digest.hexdigest()


def _part_sizes(model_dir: Path, spec: ModelSpec, numerics: Numerics) -> dict[str, int]:
    """Of "embedding", "head" and a "layer" on average; those whose files are missing as floats."""
    loader = WeightLoader(model_dir, spec, numerics)

    def size(part: str) -> int:
        try:
            return loader.part_bytes(part)
        except CheckpointError:
            return numerics.dtype.itemsize * _numel(spec, part)

    layers = sum(size(f"layer.{i}") for i in range(spec.num_layers))
    return {
        "embedding": size("embedding"),
        "layer": layers // spec.num_layers,
        "head": size("head"),
    }


def _numel(spec: ModelSpec, part: str) -> int:
    return sum(torch.Size(shape).numel() for shape in part_weights(spec, part).values())


def _names(tensors: dict[str, Shape]) -> list[list[Any]]:
    return [[name, list(shape)] for name, shape in sorted(tensors.items())]


def _stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def _read_cache(model_dir: Path) -> dict[str, Any]:
    """What was kept; a file that is missing, damaged or of another version counts as empty."""
    try:
        content = json.loads((model_dir / CACHE_NAME).read_text(encoding="utf-8"))
        if content["version"] != _CACHE_VERSION:
            return {}
        parts = content["parts"]
        complete = all({"files", "tensors", "hash"} <= set(entry) for entry in parts.values())
        return dict(parts) if complete else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_cache(model_dir: Path, entries: dict[str, Any]) -> None:
    """Whole or not at all; a directory that cannot be written to goes without."""
    temporary = model_dir / f"{CACHE_NAME}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps({"version": _CACHE_VERSION, "parts": entries}))
        temporary.replace(model_dir / CACHE_NAME)
    except OSError:
        return
