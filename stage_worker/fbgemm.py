"""FBGEMM's operations as torch has them: whether they are there, and weights packed for them.

    R outputs, I inputs

Its quantised kernels multiply 8 by 8 bits; without VNNI two products are summed in 16 bits, and a
sum beyond them is cut off. Whoever packs weights keeps within MAX_CODE_PRODUCT.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ENGINE = "fbgemm"
# Of an activation's code, 0 to 255, and a weight's: twice that must fit 16 signed bits.
MAX_CODE_PRODUCT = 2**14 - 1


@functools.cache
def is_available() -> bool:
    """FBGEMM needs AVX2."""
    operations = (
        "linear_prepack",
        "linear_with_input_q_dq_qweight_dq_output_fp32",
        "linear_prepack_fp16",
        "linear_dynamic_fp16",
    )
    return ENGINE in torch.backends.quantized.supported_engines and all(
        hasattr(torch.ops.quantized, name) for name in operations
    )


def pack_int8(values: Tensor, scales: Tensor) -> Any:
    """values: [R, I] int8; scales: [R] float32."""
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    with _engine(), warnings.catch_warnings():
        # Tensors of quantised dtypes are deprecated; this operation takes nothing else.
        warnings.simplefilter("ignore")
        tensor = torch._make_per_channel_quantized_tensor(values, scales.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(tensor, None)


def multiply_int8(x: Tensor, packed: Any, scale: float, zero: int) -> Tensor:
    """[T, I] -> [T, R] float32; x / scale + zero is rounded to 0 to 255."""
    product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        x, scale, zero, packed
    )
    return product


def pack_float16(weight: Tensor) -> Any:
    """weight: [R, I] float32, of numbers that float16 has."""
    with _engine():
        return torch.ops.quantized.linear_prepack_fp16(weight, None)


def multiply_float16(x: Tensor, packed: Any) -> Tensor:
    """[T, I] -> [T, R], in float32 but for the weights."""
    product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, packed)
    return product


# Experts may be packed beside the layers of another stage.
_packing = threading.Lock()


@contextmanager
def _engine() -> Iterator[None]:
    """Packing asks a setting of the process which library it is for; one thread at a time."""
    with _packing:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = ENGINE
        try:
            yield
        finally:
            torch.backends.quantized.engine = before
