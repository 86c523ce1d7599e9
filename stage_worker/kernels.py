"""The kernels that a stage computes with but for linear layers, chosen once when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stage_worker.attention import Attention
from stage_worker.cpu_attention import CpuAttention
from stage_worker.invariant_attention import TILE, invariant_kernel
from stage_worker.padded_attention import PaddedAttention, fast_kernel
from stagemesh.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Kernels:
    """`attention` reads the pages, `silu` is the gate of the feed-forward part."""

    attention: Attention[Any]
    silu: Callable[[Tensor], Tensor]


def _exact_silu(x: Tensor) -> Tensor:
    """silu from operations whose bits do not depend on where in a tensor an element lies.

    torch's own treats the last elements of a tensor, which fill no vector, by other instructions.
    """
    return x / (1.0 + torch.exp(-x))


FAST = Kernels(PaddedAttention(fast_kernel, 1), torch.nn.functional.silu)
FAST_CPU = Kernels(CpuAttention(), torch.nn.functional.silu)
INVARIANT = Kernels(PaddedAttention(invariant_kernel, TILE), _exact_silu)


def choose_kernels(batch_invariant: bool, dtype: torch.dtype, device: torch.device) -> Kernels:
    """Raises ConfigError where `batch_invariant` cannot be kept."""
    if not batch_invariant:
        return FAST_CPU if device.type == "cpu" else FAST
    if dtype != torch.float32 or device.type != "cpu":
        raise ConfigError("batch_invariant needs dtype float32 and device cpu")
    if not torch._C._has_mkldnn:
        raise ConfigError("batch_invariant needs a torch with oneDNN")
    return INVARIANT
