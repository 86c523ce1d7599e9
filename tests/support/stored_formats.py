"""Writes checkpoints of foreign formats, code by code, and says in float64 what they hold.

Written from the formats' descriptions, with plain loops, so that it shares nothing with the loader.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
Stored = tuple[dict[str, Tensor], Tensor]


def _groups(weight: Tensor, bits: int, size: int, symmetric: bool) -> tuple[Any, Any, Any]:
    """codes [O, I], zeros [O, G], float16 scales [O, G], of numpy."""
    matrix = weight.double().numpy()
    num_outputs, num_inputs = matrix.shape
    grouped = matrix.reshape(num_outputs, num_inputs // size, size)
    top = 2**bits - 1
    if symmetric:
        scales = np.abs(grouped).max(axis=2) / (2 ** (bits - 1) - 1)
        zeros = np.full(scales.shape, 2 ** (bits - 1))
    else:
        low = np.minimum(grouped.min(axis=2), 0)
        scales = (np.maximum(grouped.max(axis=2), 0) - low) / top
        zeros = np.rint(-low / scales)
    scales = scales.astype(np.float16)
    codes = np.rint(grouped / scales[..., None].astype(np.float64)) + zeros[..., None]
    codes = np.clip(codes, 0, top).astype(np.int64).reshape(num_outputs, num_inputs)
    return codes, np.clip(zeros, 0, top).astype(np.int64), scales


def _dense(codes: Any, zeros: Any, scales: Any, group: Any) -> Tensor:
    dense = (codes - zeros[:, group]) * scales.astype(np.float64)[:, group]
    return torch.from_numpy(dense)


def _pack(codes: Any, bits: int, order: list[int] | None = None) -> Tensor:
    """Along the last axis, the first code in the lowest bits, or order[i] in the i-th place."""
    per_int = 32 // bits
    order = order or list(range(per_int))
    width = -(-codes.shape[1] // per_int)
    packed = np.zeros((codes.shape[0], width), dtype=np.uint32)
    for column in range(width):
        for place, code in enumerate(order):
            at = column * per_int + code
            if at < codes.shape[1]:
                packed[:, column] |= (codes[:, at].astype(np.uint32)) << np.uint32(bits * place)
    return torch.from_numpy(packed.view(np.int32).copy())


def gptq(name: str, weight: Tensor, bits: int = 4, act_order: bool = False) -> Stored:
    codes, zeros, scales = _groups(weight, bits, GROUP, symmetric=False)
    zeros = np.maximum(zeros, 1)  # stored less one
    group = np.arange(weight.shape[1]) // GROUP
    if act_order:
        group = np.random.default_rng(0).permutation(group)
    module = name.removesuffix("weight")
    tensors = {
        module + "qweight": _pack(codes, bits).t().contiguous(),
        module + "qzeros": _pack((zeros - 1).T, bits),
        module + "scales": torch.from_numpy(scales.T.copy()),
        module + "g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    return tensors, _dense(codes, zeros, scales, group)


def awq(name: str, weight: Tensor) -> Stored:
    codes, zeros, scales = _groups(weight, 4, GROUP, symmetric=False)
    module = name.removesuffix("weight")
    tensors = {
        module + "qweight": _pack(codes.T, 4, AWQ_ORDER),
        module + "qzeros": _pack(zeros.T, 4, AWQ_ORDER),
        module + "scales": torch.from_numpy(scales.T.copy()),
    }
    return tensors, _dense(codes, zeros, scales, np.arange(weight.shape[1]) // GROUP)


def packed(name: str, weight: Tensor, bits: int = 4, symmetric: bool = True) -> Stored:
    size = GROUP if bits == 4 else weight.shape[1]
    codes, zeros, scales = _groups(weight, bits, size, symmetric)
    module = name.removesuffix("weight")
    tensors = {
        module + "weight_packed": _pack(codes, bits),
        module + "weight_scale": torch.from_numpy(scales),
        module + "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors[module + "weight_zero_point"] = _pack(zeros.T, bits).t().contiguous()
    return tensors, _dense(codes, zeros, scales, np.arange(weight.shape[1]) // size)


def int8(name: str, weight: Tensor) -> Stored:
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127).bfloat16()
    codes = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    module = name.removesuffix("weight")
    tensors = {name: codes, module + "weight_scale": scale}
    return tensors, codes.double() * scale.double()


def fp8(name: str, weight: Tensor, block: int | None = 128, per_matrix: bool = False) -> Stored:
    module = name.removesuffix("weight")
    num_outputs, num_inputs = weight.shape
    rows, columns = (num_outputs, num_inputs) if per_matrix else (1, num_inputs)
    rows, columns = (block, block) if block else (rows, columns)
    scale = torch.zeros(-(-num_outputs // rows), -(-num_inputs // columns))
    codes = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
    dense = torch.zeros(weight.shape, dtype=torch.float64)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale[i, j] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn)
            dense[at] = codes[at].double() * scale[i, j].double()
    if block:
        return {name: codes, module + "weight_scale_inv": scale}, dense
    return {name: codes, module + "weight_scale": scale.view(-1) if per_matrix else scale}, dense


def _compressed(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


_GPTQ = {"quant_method": "gptq", "group_size": GROUP, "sym": False, "desc_act": False, "bits": 4}
_INT = {"type": "int", "dynamic": False}
_FP8 = {"type": "float", "num_bits": 8, "symmetric": True, "dynamic": False}

# What writes one matrix, and the quantization_config that says so.
FORMATS: dict[str, tuple[Callable[[str, Tensor], Stored], dict[str, Any]]] = {
    "gptq": (gptq, _GPTQ),
    "gptq-act-order": (lambda n, w: gptq(n, w, act_order=True), {**_GPTQ, "desc_act": True}),
    "gptq-8": (lambda n, w: gptq(n, w, bits=8), {**_GPTQ, "bits": 8}),
    "awq": (
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
    ),
    "pack-quantized": (
        packed,
        _compressed(
            "pack-quantized",
            {**_INT, "num_bits": 4, "symmetric": True, "strategy": "group", "group_size": GROUP},
        ),
    ),
    "pack-quantized-asymmetric": (
        lambda n, w: packed(n, w, symmetric=False),
        _compressed(
            "pack-quantized",
            {**_INT, "num_bits": 4, "symmetric": False, "strategy": "group", "group_size": GROUP},
        ),
    ),
    "pack-quantized-8": (
        lambda n, w: packed(n, w, bits=8),
        _compressed(
            "pack-quantized", {**_INT, "num_bits": 8, "symmetric": True, "strategy": "channel"}
        ),
    ),
    "int-quantized": (
        int8,
        _compressed(
            "int-quantized", {**_INT, "num_bits": 8, "symmetric": True, "strategy": "channel"}
        ),
    ),
    "fp8-blocks": (
        lambda n, w: fp8(n, w, block=48),
        {"quant_method": "fp8", "weight_block_size": [48, 48], "activation_scheme": "dynamic"},
    ),
    "fp8-channels": (
        lambda n, w: fp8(n, w, block=None),
        _compressed("float-quantized", {**_FP8, "strategy": "channel"}),
    ),
    "fp8-matrices": (
        lambda n, w: fp8(n, w, block=None, per_matrix=True),
        _compressed("float-quantized", {**_FP8, "strategy": "tensor"}),
    ),
}


def write_stored(plain: Path, out: Path, name: str) -> Path:
    """`plain` in the format `name`, and what it holds, as floats, in the directory returned."""
    write, told = FORMATS[name]
    stored, floats = {}, {}
    for key, tensor in load_file(plain / "model.safetensors").items():
        if key.endswith("_proj.weight"):
            tensors, dense = write(key, tensor.float())
            stored |= tensors
            floats[key] = dense.float()
        else:
            stored[key] = floats[key] = tensor
    dequantised = out.with_name(out.name + "-as-floats")
    shutil.copytree(plain, dequantised)
    save_file(floats, dequantised / "model.safetensors")
    shutil.copytree(plain, out)
    save_file(stored, out / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    return dequantised
