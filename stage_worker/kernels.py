"""The kernels that a stage computes with but for linear layers, chosen once when it is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stage_worker.attention import Attention, Scores
from stage_worker.cpu_attention import CpuAttention
from stage_worker.experts import Gate
from stage_worker.invariant_attention import TILE, invariant_kernel
from stage_worker.padded_attention import PaddedAttention, fast_kernel
from stagemesh.errors import ConfigError
from stagemesh.families import GELU_TANH, SILU
from stagemesh.model_spec import ModelSpec
from stagemesh.moe_spec import ClampedSwiglu

_Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Kernels:
    """`attention` reads the pages, `gate` joins the halves of a feed-forward part."""

    attention: Attention[Any]
    gate: Gate


def choose_kernels(
    spec: ModelSpec, batch_invariant: bool, dtype: torch.dtype, device: torch.device
) -> Kernels:
    """Raises ConfigError where `batch_invariant` cannot be kept."""
    scores = Scores(spec.scales.attention, spec.scales.attention_cap)
    gate = _choose_gate(spec, exact=batch_invariant)
    if not batch_invariant:
        if device.type == "cpu":
            return Kernels(CpuAttention(scores), gate)
        return Kernels(PaddedAttention(fast_kernel, 1, scores), gate)
    if dtype != torch.float32 or device.type != "cpu":
        raise ConfigError("batch_invariant needs dtype float32 and device cpu")
    if not torch._C._has_mkldnn:
        raise ConfigError("batch_invariant needs a torch with oneDNN")
    attention = PaddedAttention(invariant_kernel, TILE, scores)
    return Kernels(attention, gate)


def _choose_gate(spec: ModelSpec, *, exact: bool) -> Gate:
    swiglu = spec.moe.swiglu if spec.moe is not None else None
    if swiglu is not None:  # a model that has one has it in every layer
        return partial(_clamped, swiglu, _exact_sigmoid if exact else torch.sigmoid)
    return partial(_gated, (_EXACT if exact else _FAST)[spec.activation])


def _gated(activation: _Function, gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate).mul_(up)


def _clamped(swiglu: ClampedSwiglu, sigmoid: _Function, gate: Tensor, up: Tensor) -> Tensor:
    gate = gate.clamp(max=swiglu.limit)
    up.clamp_(-swiglu.limit, swiglu.limit).add_(1.0)
    return sigmoid(gate * swiglu.alpha).mul_(gate).mul_(up)


def _exact_sigmoid(x: Tensor) -> Tensor:
    """As `_exact_silu`."""
    return 1.0 / (1.0 + torch.exp(-x))


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


_FAST: dict[str, _Function] = {SILU: torch.nn.functional.silu, GELU_TANH: _gelu_tanh}
_EXACT: dict[str, _Function] = {SILU: _exact_silu, GELU_TANH: _exact_gelu_tanh}
