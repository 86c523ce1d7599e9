"""How a checkpoint's files hold quantised weights: what `quantization_config` of config.json says.

Understands compressed-tensors (int-quantized, pack-quantized, float-quantized), GPTQ, AWQ (GEMM),
block-wise fp8, and MXFP4 of a mixture's experts. What would be read wrongly is an UnsupportedModel
that names the key. Knows neither tensors nor files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stagemesh.errors import CheckpointError, UnsupportedModel

# Weights in a row that share a scale.
MXFP4_BLOCK = 32
_MXFP4 = "mxfp4"
_LAYOUTS = {
    "int-quantized": "int",
    "naive-quantized": "int",
    "pack-quantized": "packed",
    "float-quantized": "fp8",
}


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """One way to hold a matrix. `layout` is "int", "packed", "fp8", "gptq", "awq" or "mxfp4".

    `group_size` inputs share a scale, None: all. `block` (outputs, inputs) does, for fp8; or all
    weights of the matrix with `is_per_matrix`. GPTQ: zero points are stored less `zero_offset`, and
    with `has_order` an input's group is anyone's. `scale_name`: the tensor of fp8's scales.
    """

    layout: str
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    block: tuple[int, int] | None = None
    is_per_matrix: bool = False
    zero_offset: int = 0
    has_order: bool = False
    scale_name: str = "weight_scale"


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """`ways` are (targets, way): the first with a target that names a module is its."""

    ways: tuple[tuple[tuple[str, ...], StoredWeights], ...]
    ignored: tuple[str, ...]

    @property
    def is_mxfp4(self) -> bool:
        return any(way.layout == _MXFP4 for _, way in self.ways)

    def of_weight(self, name: str) -> StoredWeights | None:
        """Of a linear layer's "….weight"; None where it is stored plain."""
        module = name.removesuffix(".weight")
        if any(_names(pattern, module) for pattern in self.ignored):
            return None
        for targets, way in self.ways:
            if any(target == "Linear" or _names(target, module) for target in targets):
                return way
        return None


def parse_stored_format(config: Mapping[str, Any]) -> StoredFormat | None:
    """Of a parsed config.json; None for plain files. Raises UnsupportedModel, CheckpointError."""
    told = config.get("quantization_config") or config.get("compression_config")
    if not told:
        return None
    method = str(told.get("quant_method", ""))
    if method not in _PARSERS:
        raise UnsupportedModel(
            f"quantization_config: quant_method {method!r} is not supported "
            f"(known: {', '.join(_PARSERS)})"
        )
    try:
        return _PARSERS[method](told)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"config.json: quantization_config is damaged: {error!r}") from error


def _parse_compressed_tensors(told: Mapping[str, Any]) -> StoredFormat:
    ways = []
    for group in told["config_groups"].values():
        weights = group["weights"]
        form = str(group.get("format") or told["format"])
        _check(form in _LAYOUTS, "format", form)
        layout = "fp8" if weights["type"] == "float" else _LAYOUTS[form]
        bits = int(weights["num_bits"])
        _check(bits in {"int": (8,), "packed": (4, 8), "fp8": (8,)}[layout], "num_bits", bits)
        _check(weights.get("actorder") in (None, False, "weight", "static"), "actorder", weights)
        strategy = weights["strategy"]
        known = ("channel", "tensor", "block") if layout == "fp8" else ("channel", "group")
        _check(strategy in known, "strategy", strategy)
        way = StoredWeights(
            layout,
            bits,
            group_size=int(weights["group_size"]) if strategy == "group" else None,
            symmetric=bool(weights.get("symmetric", True)),
            block=_block(weights["block_structure"]) if strategy == "block" else None,
            is_per_matrix=strategy == "tensor",
        )
        _check(way.symmetric or layout != "int", "symmetric", False)
        ways.append((tuple(map(str, group["targets"])), way))
    return StoredFormat(tuple(ways), tuple(map(str, told.get("ignore") or ())))


def _parse_gptq(told: Mapping[str, Any]) -> StoredFormat:
    bits = int(told["bits"])
    _check(bits in (4, 8), "bits", bits)
    form = told.get("checkpoint_format", "gptq")
    _check(form in ("gptq", "gptq_v2"), "checkpoint_format", form)
    size = int(told.get("group_size", -1))
    way = StoredWeights(
        "gptq",
        bits,
        group_size=None if size < 0 else size,
        symmetric=False,
        zero_offset=1 if form == "gptq" else 0,
        has_order=bool(told.get("desc_act", False)),
    )
    return StoredFormat(((("Linear",), way),), () if told.get("lm_head") else ("lm_head",))


def _parse_awq(told: Mapping[str, Any]) -> StoredFormat:
    _check(int(told["bits"]) == 4, "bits", told["bits"])
    version = str(told.get("version", "gemm")).lower()
    _check(version == "gemm", "version", version)
    _check(bool(told.get("zero_point", True)), "zero_point", False)
    size = int(told["group_size"])
    way = StoredWeights("awq", 4, group_size=None if size < 0 else size, symmetric=False)
    return StoredFormat(((("Linear",), way),), ("lm_head", *_not_converted(told)))


def _parse_fp8(told: Mapping[str, Any]) -> StoredFormat:
    block = told.get("weight_block_size")
    _check(block is not None, "weight_block_size", block)
    way = StoredWeights("fp8", 8, block=_block(block), scale_name="weight_scale_inv")
    return StoredFormat(((("Linear",), way),), ("lm_head", *_not_converted(told)))


def _parse_mxfp4(told: Mapping[str, Any]) -> StoredFormat:
    """Which has experts only, whatever its names of other modules, in patterns, are."""
    way = StoredWeights(_MXFP4, 4, group_size=MXFP4_BLOCK)
    return StoredFormat(((("experts",), way),), ())


_PARSERS = {
    "compressed-tensors": _parse_compressed_tensors,
    "gptq": _parse_gptq,
    "awq": _parse_awq,
    "fp8": _parse_fp8,
    _MXFP4: _parse_mxfp4,
}


def _not_converted(told: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(map(str, told.get("modules_to_not_convert") or ()))


def _block(sizes: Any) -> tuple[int, int]:
    num_outputs, num_inputs = map(int, sizes)
    return num_outputs, num_inputs


def _check(supported: bool, key: str, value: Any) -> None:
    if not supported:
        raise UnsupportedModel(f"quantization_config: {key} {value!r} is not supported")


def _names(pattern: str, module: str) -> bool:
    """A module's name, a part of it between dots, or "re:" and what its beginning matches."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return f".{pattern}." in f".{module}."
