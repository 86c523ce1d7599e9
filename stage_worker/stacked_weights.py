"""Reads the weights of experts that files hold stacked, as floats or as MXFP4.

    R rows (outputs) that are read, O outputs, I inputs, G blocks of 32 inputs

MXFP4 (OCP Microscaling Formats, 2023): a block has a scale of 8 bits, an exponent of two, and each
of its weights 4 bits: a sign, two bits of exponent and one of mantissa.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from stage_worker.checkpoint import Checkpoint
from stage_worker.expert_stacks import Stack, stack_of
from stage_worker.layout import Shape
from stage_worker.sharding import Part
from stage_worker.weight_source import Codes
from stagemesh.model_spec import ModelSpec
from stagemesh.stored_format import MXFP4_BLOCK

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT_BIAS = 127


def _byte_values() -> Tensor:
    """[256, 2]: the two weights of each byte, the first in the lower bits."""
    codes = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
    low = codes.repeat(len(codes))
    return torch.stack((low, codes.repeat_interleave(len(codes))), dim=1)


_BYTES = _byte_values()
_SCALES = torch.ldexp(torch.ones(256), torch.arange(256) - _EXPONENT_BIAS)


def float_view(files: Checkpoint, spec: ModelSpec, name: str, shape: Shape) -> Tensor:
    """A weight or bias that files hold as floats, whether or not in a tensor of its own, as
    `Checkpoint.view`."""
    stack = stack_of(spec, name, shape)
    if stack is None:
        return files.view(name, shape)
    ((stacked, stacked_shape),) = stack.tensors.items()
    own = files.view(stacked, stacked_shape)[stack.expert]
    return (own if own.dim() == 1 else own.t())[stack.outputs]


class Mxfp4Source:
    """A `WeightSource`: floats, since no kernel takes these codes. All of them are bfloat16's
    numbers, so that is how many bits they count for."""

    bits = 16
    group_size = None

    def __init__(self, blocks: Tensor, scales: Tensor, inputs: range) -> None:
        """blocks: [O, G, 16] bytes; scales: [O, G] bytes; of which `inputs` are wanted."""
        self._blocks = blocks
        self._scales = scales
        self._inputs = inputs
        self.shape = (len(blocks), len(inputs))

    @classmethod
    def open(cls, files: Checkpoint, stack: Stack) -> Self:
        """Errors as of `Checkpoint.view`."""
        blocks, scales = (
            files.codes(name, shape)[stack.expert][stack.outputs]
            for name, shape in stack.tensors.items()
        )
        return cls(blocks, scales, range(blocks.shape[1] * MXFP4_BLOCK))

    def part(self, part: Part) -> Self:
        """What a rank has of it: nothing but the blocks of its inputs is read."""
        inputs = self._inputs[part.columns]
        return type(self)(self._blocks[part.rows], self._scales[part.rows], inputs)

    def dense(self, start: int, end: int) -> Tensor:
        first = self._inputs.start // MXFP4_BLOCK
        held = slice(first, -(-self._inputs.stop // MXFP4_BLOCK))
        blocks, scales = self._blocks[start:end, held], self._scales[start:end, held]
        values = _BYTES.index_select(0, blocks.reshape(-1).int()).view(*scales.shape, -1)
        values.mul_(_SCALES.index_select(0, scales.reshape(-1).int()).view(*scales.shape, 1))
        skipped = self._inputs.start - first * MXFP4_BLOCK
        return values.flatten(1)[:, skipped : skipped + self.shape[1]]

    def codes(self, start: int, end: int) -> Codes:
        raise AssertionError("there is no kernel for these codes")
