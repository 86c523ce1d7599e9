"""What a device can do at best: its memory's bandwidth and its matrix products, measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.cuda_stage.shapes import ModelShape

_COPY_BYTES = 2**31
_MATRIX_SIZE = 8192


@dataclass(frozen=True, slots=True)
class Limits:
    """`copy_bytes_per_s`: read plus written by a copy within the device; `read_bytes_per_s`: read
    by a sum, which is what decode is to be compared with, since it hardly writes."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    flop_per_s: float


def measure_limits(device: torch.device) -> Limits:
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _fastest_s(lambda: target.copy_(source))
    numbers = source.view(torch.float32)
    read_s = _fastest_s(lambda: numbers.sum())
    a, b = (
        torch.randn(_MATRIX_SIZE, _MATRIX_SIZE, dtype=torch.bfloat16, device=device)
        for _ in range(2)
    )
    product_s = _fastest_s(lambda: a @ b)
    return Limits(2 * _COPY_BYTES / copy_s, _COPY_BYTES / read_s, 2 * _MATRIX_SIZE**3 / product_s)


def _fastest_s(work: Callable[[], object]) -> float:
    """Of ten times, after warming up."""
    times_s: list[float] = []
    for i in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        if i >= 5:
            times_s.append(start.elapsed_time(end) / 1e3)
    return min(times_s)


def layer_parameters(shape: ModelShape) -> int:
    """Of all layers' matrices."""
    head_dim = shape.hidden_size // shape.num_heads
    attention = 2 * shape.hidden_size * head_dim * (shape.num_heads + shape.num_kv_heads)
    return shape.num_layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)


def decode_bytes(shape: ModelShape, batch: int, context: float) -> float:
    """What a decode step must read: each matrix once, and every row's keys and values."""
    matrices = layer_parameters(shape) + shape.vocab_size * shape.hidden_size
    head_dim = shape.hidden_size // shape.num_heads
    kv_per_token = 2 * shape.num_layers * shape.num_kv_heads * head_dim
    return 2 * (matrices + batch * context * kv_per_token)


def prefill_flop(shape: ModelShape, num_tokens: int) -> float:
    """Matrix products of the layers and causal attention; logits are those of one token."""
    attention = 2 * num_tokens**2 * shape.hidden_size * shape.num_layers
    return 2.0 * num_tokens * layer_parameters(shape) + attention
