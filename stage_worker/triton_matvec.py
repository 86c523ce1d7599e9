"""Triton kernel: a matrix times one vector, with what comes before and after it in a decoder layer.

    I inputs, O outputs

One pass over the weights at the bandwidth of the device's memory: an RMS norm before it, a residual
added after it and the gate of an MLP cost no kernel of their own. With programmatic dependent
launch the weights are already on their way while the kernel before still computes the vector.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _matvec(
    x,  # [I]
    weight,  # [O, I], or [2 * O, I] where gated: the gate's rows, then those it gates
    norm,  # [I] where NORM
    addend,  # [O] where ADD: a residual or a bias
    output,  # [O]
    eps,
    I: tl.constexpr,
    O: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    EARLY: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    columns = tl.arange(0, BLOCK_I)
    live = rows < O
    base = weight + rows[:, None].to(tl.int64) * I
    gated_base = base + O * I
    sums = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    gated_sums = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    squares = tl.zeros([BLOCK_I], tl.float32)
    if EARLY:
        gdc_launch_dependents()
        seen = live[:, None] & (columns < I)[None, :]
        w = tl.load(base + columns[None, :], mask=seen, other=0.0, eviction_policy="evict_first")
        if GATED:
            g = tl.load(
                gated_base + columns[None, :], mask=seen, other=0.0, eviction_policy="evict_first"
            )
        gdc_wait()
        part = tl.load(x + columns, mask=columns < I, other=0.0).to(tl.float32)
        if NORM:
            squares += part * part
            part *= tl.load(norm + columns, mask=columns < I, other=0.0).to(tl.float32)
        sums += w.to(tl.float32) * part[None, :]
        if GATED:
            gated_sums += g.to(tl.float32) * part[None, :]
    for start in tl.range(BLOCK_I if EARLY else 0, I, BLOCK_I):
        at = start + columns
        seen = live[:, None] & (at < I)[None, :]
        w = tl.load(base + at[None, :], mask=seen, other=0.0, eviction_policy="evict_first")
        if GATED:
            g = tl.load(
                gated_base + at[None, :], mask=seen, other=0.0, eviction_policy="evict_first"
            )
        part = tl.load(x + at, mask=at < I, other=0.0).to(tl.float32)
        if NORM:
            squares += part * part
            part *= tl.load(norm + at, mask=at < I, other=0.0).to(tl.float32)
        sums += w.to(tl.float32) * part[None, :]
        if GATED:
            gated_sums += g.to(tl.float32) * part[None, :]
    result = tl.sum(sums, 1)
    gated = tl.sum(gated_sums, 1)
    if NORM:
        factor = tl.rsqrt(tl.sum(squares) / I + eps)
        result *= factor
        gated *= factor
    if GATED:
        result = result / (1.0 + tl.exp(-result)) * gated
    if ADD:
        result += tl.load(addend + rows, mask=live, other=0.0).to(tl.float32)
    tl.store(output + rows, result.to(output.dtype.element_ty), mask=live)


def matvec(
    x: Tensor,
    weight: Tensor,
    output: Tensor,
    *,
    norm: Tensor | None = None,
    addend: Tensor | None = None,
    gated: bool = False,
    eps: float = 0.0,
    block_o: int = 2,
    block_i: int = 2048,
    num_warps: int = 4,
    num_stages: int = 2,
    early: bool = False,
) -> Tensor:
    num_outputs = output.numel()
    grid: Any = (triton.cdiv(num_outputs, block_o),)
    _matvec[grid](
        x,
        weight,
        weight if norm is None else norm,
        weight if addend is None else addend,
        output,
        eps,
        I=weight.shape[1],
        O=num_outputs,
        NORM=norm is not None,
        ADD=addend is not None,
        GATED=gated,
        BLOCK_O=block_o,
        BLOCK_I=min(block_i, triton.next_power_of_2(weight.shape[1])),
        EARLY=early,
        num_warps=num_warps,
        num_stages=num_stages,
        **({"launch_pdl": True} if early else {}),
    )
    return output


def supports_early(device: torch.device) -> bool:
    """Programmatic dependent launch came with compute capability 9.0."""
    return torch.cuda.get_device_capability(device) >= (9, 0)
