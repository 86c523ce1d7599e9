"""Writes a checkpoint whose linear layers are quantised, from one whose are not.

Files are in the format of compressed-tensors, which other engines read too: "int-quantized" for 8
bits, "pack-quantized" for 4. One file for each part of the model, so that memory holds a part at a
time. What the result computes is what the original computes when it is quantised as it is loaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stage_worker.checkpoint import INDEX, Checkpoint
from stage_worker.expert_stacks import stack_of
from stage_worker.layout import (
    EMBEDDING,
    HEAD,
    Shape,
    all_parts,
    is_quantisable,
    part_weights,
    stored_way,
)
from stage_worker.linear import rows_per_piece
from stage_worker.quantise import to_int4, to_int8
from stage_worker.stacked_weights import Mxfp4Source, float_view
from stage_worker.weight_source import FloatSource, WeightSource
from stagemesh.errors import CheckpointError, ConfigError
from stagemesh.model_spec import ModelSpec
from stagemesh.quantization import AUTO, INT8, NONE, Quantization, group_size

_PER_INT = 8


def quantise_checkpoint(
    model_dir: Path,
    out_dir: Path,
    quantization: Quantization,
    on_part: Callable[[str], None] = lambda part: None,
) -> int:
    """Returns the bytes of all tensors written; `on_part(part)` is called before each.

    Raises ConfigError, CheckpointError, UnsupportedModel.
    """
    spec = ModelSpec.from_directory(model_dir)
    _check(spec, quantization, out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    writer = _Writer(Checkpoint(model_dir), spec, quantization)
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for part in all_parts(spec):
        on_part(part)
        tensors = writer.tensors_of(part)
        if not tensors:
            continue
        file = f"{part}.safetensors"
        save_file(tensors, out_dir / file, metadata={"format": "pt"})
        (out_dir / file).chmod(0o644)  # else nobody but its owner may read it
        weight_map |= dict.fromkeys(tensors, file)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (out_dir / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    _copy_the_rest(model_dir, out_dir)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _config(spec, quantization)
    if quantization.head != NONE:
        config["tie_word_embeddings"] = False
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return num_bytes


class _Writer:
    def __init__(self, files: Checkpoint, spec: ModelSpec, quantization: Quantization) -> None:
        self._files = files
        self._spec = spec
        self._quantization = quantization

    def tensors_of(self, part: str) -> dict[str, Tensor]:
        """None of a head that stays the embedding's tensor."""
        scheme = NONE if part in ("embedding", "norm") else self._quantization.of_part(part)
        if part == "head" and self._spec.tie_embeddings and scheme == NONE:
            return {}
        tensors: dict[str, Tensor] = {}
        for name, shape in part_weights(self._spec, part).items():
            if scheme == NONE or not (is_quantisable(name) or name == EMBEDDING):
                tensors[name] = self._plain(name, shape)
            else:
                module = (HEAD if name == EMBEDDING else name).removesuffix("weight")
                matrix = self._matrix(name, shape)
                tensors |= (
                    _int8(module, matrix) if scheme == INT8 else _int4(module, matrix, scheme)
                )
        return tensors

    def _plain(self, name: str, shape: Shape) -> Tensor:
        """What is a tensor of floats in the result."""
        if stored_way(self._spec, name) is None:
            return float_view(self._files, self._spec, name, shape).contiguous()
        return self._matrix(name, shape).dense(0, shape[0]).bfloat16()

    def _matrix(self, name: str, shape: Shape) -> WeightSource:
        stack = stack_of(self._spec, name, shape)
        if stack is not None and stored_way(self._spec, name) is not None:
            return Mxfp4Source.open(self._files, stack)
        return FloatSource(float_view(self._files, self._spec, name, shape))


def _int8(module: str, matrix: WeightSource) -> dict[str, Tensor]:
    pieces = [to_int8(piece) for piece in _pieces(matrix)]
    return {
        module + "weight": torch.cat([piece.values for piece in pieces]),
        module + "weight_scale": torch.cat([piece.scales for piece in pieces]),
    }


def _int4(module: str, matrix: WeightSource, scheme: str) -> dict[str, Tensor]:
    pieces = [to_int4(piece, group_size(scheme)) for piece in _pieces(matrix)]
    num_inputs = matrix.shape[1]
    zeros = torch.cat([piece.zeros for piece in pieces])
    return {
        module + "weight_packed": torch.cat([_pack(x.values[:, :num_inputs]) for x in pieces]),
        module + "weight_scale": torch.cat([piece.scales for piece in pieces]).bfloat16(),
        module + "weight_zero_point": _pack(zeros.t()).t().contiguous(),
        module + "weight_shape": torch.tensor(matrix.shape, dtype=torch.int64),
    }


def _pieces(matrix: WeightSource) -> Iterator[Tensor]:
    num_outputs, num_inputs = matrix.shape
    size = rows_per_piece(num_inputs)
    for start in range(0, num_outputs, size):
        yield matrix.dense(start, min(start + size, num_outputs))


def _pack(codes: Tensor) -> Tensor:
    """[R, n] of 0 to 15 -> [R, ceil(n / 8)] int32, the first in the lowest bits."""
    padded = torch.nn.functional.pad(codes.to(torch.int32), (0, -codes.shape[1] % _PER_INT))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    # Bits of different codes do not meet: their sum is their union.
    eights = padded.view(len(codes), -1, _PER_INT) << shifts
    return eights.sum(dim=2, dtype=torch.int32)


def _config(spec: ModelSpec, quantization: Quantization) -> dict[str, Any]:
    parts = [f"layer.{i}" for i in range(spec.num_layers)]
    layers: dict[str, list[int]] = {}
    for i, part in enumerate(parts):
        layers.setdefault(quantization.of_part(part), []).append(i)
    targets = {
        scheme: [f"re:model\\.layers\\.({'|'.join(map(str, numbers))})\\..*(_proj|\\.w[123])"]
        for scheme, numbers in layers.items()
    }
    targets.setdefault(quantization.head, []).append("lm_head")
    quantised = {scheme: names for scheme, names in targets.items() if scheme != NONE}
    groups = {
        f"group_{i}": {"targets": names, **_group(scheme)}
        for i, (scheme, names) in enumerate(sorted(quantised.items()))
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": targets.get(NONE, []),
    }


def _group(scheme: str) -> dict[str, Any]:
    if scheme == INT8:
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
        inputs = {**weights, "strategy": "token", "dynamic": True}
        return {"format": "int-quantized", "weights": weights, "input_activations": inputs}
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"}
    return {
        "format": "pack-quantized",
        "weights": {**weights, "group_size": group_size(scheme)},
        "input_activations": None,
    }


def _check(spec: ModelSpec, quantization: Quantization, out_dir: Path) -> None:
    schemes = {quantization.of_part(f"layer.{i}") for i in range(spec.num_layers)}
    schemes.add(quantization.head)
    if AUTO in schemes or schemes == {NONE}:
        raise ConfigError(f"--scheme {quantization}: say what is to be int8 or int4")
    # Of a model that is published as MXFP4 there is no other original.
    if spec.stored is not None and not spec.stored.is_mxfp4:
        raise CheckpointError("the model is quantised already: take the original")
    if out_dir.exists() and any(out_dir.iterdir()):
        raise ConfigError(f"{out_dir} is not empty")


def _copy_the_rest(model_dir: Path, out_dir: Path) -> None:
    """Tokenizer, chat template and what else people put beside the weights."""
    for path in sorted(model_dir.iterdir()):
        is_weights = path.suffix == ".safetensors" or path.name == INDEX
        if path.is_file() and not is_weights and not path.name.startswith("."):
            shutil.copy(path, out_dir / path.name)
