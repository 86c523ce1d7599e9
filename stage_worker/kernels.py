"""The kernels that a stage computes with but for linear layers, chosen once when it is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stage_worker.attention import Attention, Scores
from stage_worker.cpu_attention import CpuAttention
from stage_worker.invariant_attention import TILE, invariant_kernel
from stage_worker.padded_attention import PaddedAttention, fast_kernel
from stagemesh.errors import ConfigError
from stagemesh.families import GELU_TANH, SILU
from stagemesh.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Kernels:
    """`attention` reads the pages, `gate` is the gate of the feed-forward part."""

    attention: Attention[Any]
    gate: Callable[[Tensor], Tensor]


def choose_kernels(
    spec: ModelSpec, batch_invariant: bool, dtype: torch.dtype, device: torch.device
) -> Kernels:
    """Raises ConfigError where `batch_invariant` cannot be kept."""
    scores = Scores(spec.scales.attention, spec.scales.attention_cap)
    if not batch_invariant:
        gate = _FAST_GATES[spec.activation]
        if device.type == "cpu":
            return Kernels(CpuAttention(scores), gate)
        return Kernels(PaddedAttention(fast_kernel, 1, scores), gate)
    if dtype != torch.float32 or device.type != "cpu":
        raise ConfigError("batch_invariant needs dtype float32 and device cpu")
    if not torch._C._has_mkldnn:
        raise ConfigError("batch_invariant needs a torch with oneDNN")
    attention = PaddedAttention(invariant_kernel, TILE, scores)
    return Kernels(attention, _EXACT_GATES[spec.activation])


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _exact_silu(x: Tensor) -> Tensor:
    """silu from operations whose bits do not depend on where in a tensor an element lies.

    torch's own treats the last elements of a tensor, which fill no vector, by other instructions.
    """
    return x / (1.0 + torch.exp(-x))


def _exact_gelu_tanh(x: Tensor) -> Tensor:
    """As `_exact_silu`: (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u))."""
    twice = (x * x * x * 0.044715 + x) * (2 * math.sqrt(2 / math.pi))
    return x / (1.0 + torch.exp(-twice))


_Gates = dict[str, Callable[[Tensor], Tensor]]
_FAST_GATES: _Gates = {SILU: torch.nn.functional.silu, GELU_TANH: _gelu_tanh}
_EXACT_GATES: _Gates = {SILU: _exact_silu, GELU_TANH: _exact_gelu_tanh}
