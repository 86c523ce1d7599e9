"""Rounds numbers to few bits: pure functions of rows, to be stored, computed with or sent.

R rows (outputs), I inputs, G groups of inputs
"""

from __future__ import annotations

import torch
from torch import Tensor

from stage_worker.weight_source import Codes

# Beside an activation's 8 bits; see fbgemm.MAX_CODE_PRODUCT.
INT8_MAX = 64
INT4_MAX = 15
# Of what is only stored or sent as int8, and turned back.
_CODE_MAX = 127
_SMALLEST = torch.finfo(torch.float32).tiny


def to_int8(rows: Tensor) -> Codes:
    """One scale a row; codes in [-INT8_MAX, INT8_MAX], int8. rows: [R, I]."""
    wide = rows.to(torch.float32)
    scales = wide.abs().amax(dim=1, keepdim=True).div_(INT8_MAX)
    scales.masked_fill_(scales == 0, 1.0)
    values = (wide / scales).round_().to(torch.int8)
    return Codes(values, scales, torch.zeros_like(scales))


def to_int4(rows: Tensor, group_size: int) -> Codes:
    """A scale, of bfloat16's numbers, and a zero point for each group; codes in [0, INT4_MAX].

    rows: [R, I]. A last group that is not full has fewer inputs: it is filled with zeros, I grows.
    """
    wide = torch.nn.functional.pad(rows.to(torch.float32), (0, -rows.shape[1] % group_size))
    grouped = wide.view(len(wide), -1, group_size)
    # Zero is always a code.
    lowest = grouped.amin(dim=2).clamp_(max=0.0)
    scales = grouped.amax(dim=2).clamp_(min=0.0).sub_(lowest).div_(INT4_MAX)
    scales = scales.masked_fill_(scales == 0, 1.0).to(torch.bfloat16).to(torch.float32)
    zeros = (-lowest / scales).round_().clamp_(0, INT4_MAX)
    values = (grouped / scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, INT4_MAX)
    return Codes(values.to(torch.uint8).view(len(wide), -1), scales, zeros)


def round_vectors(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric codes, int8, and a float32 scale for each vector of the last dimension [..., 1].

    What a vector becomes depends on it alone. The scale of one that is not finite is
    not finite either, and what it is multiplied by neither.
    """
    wide = numbers.to(torch.float32)
    scales = wide.abs().amax(dim=-1, keepdim=True).div_(_CODE_MAX).clamp_(min=_SMALLEST)
    codes = (wide / scales).round_().nan_to_num_().to(torch.int8)
    return codes, scales
