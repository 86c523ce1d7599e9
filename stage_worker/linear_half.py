"""Linear layers in float32 on a CPU whose weights take 16 bits: those of files that have 16.

    T tokens, I inputs, O outputs

The arithmetic is float32; a weight is widened when it is read. What files have as bfloat16 fits
float16 but for weights next to nothing, and a layer is held so only where what that changes is
lost among the roundings of float32. Bits depend on the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stage_worker import fbgemm
from stage_worker.linear import LinearSource

# Norm of what an output's weights lose, against their own: a few last places of float32.
_MAX_ERROR = 2.0**-21
_ROWS_CHECKED = 64


class HalfLinear:
    def __init__(
        self, pieces: Sequence[Any], bias: Tensor | None, num_inputs: int, num_outputs: int
    ) -> None:
        self._pieces = pieces
        self._bias = bias
        self._num_outputs = num_outputs
        self._weight_bytes = 2 * num_inputs * num_outputs

    @classmethod
    def make(cls, source: LinearSource) -> HalfLinear | None:
        """None where float16 does not have the weights."""
        if not all(_fits(matrix.dense(start, end)) for matrix, start, end in source.pieces()):
            return None
        pieces = []
        for piece in source.dense_pieces():
            pieces.append(fbgemm.pack_float16(piece))
            source.on_bytes(2 * piece.numel())
        bias = source.bias(torch.float32, torch.device("cpu"))
        return cls(pieces, bias, source.num_inputs, source.num_outputs)

    @property
    def nbytes(self) -> int:
        return self._weight_bytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self._num_outputs)
        outputs = [fbgemm.multiply_float16(x, piece) for piece in self._pieces]
        whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return whole if self._bias is None else whole.add_(self._bias)


def _fits(weight: Tensor) -> bool:
    """weight: [R, I]."""
    if weight.dtype == torch.float16:
        return True
    return all(map(_rows_fit, torch.split(weight, _ROWS_CHECKED)))


def _rows_fit(weight: Tensor) -> bool:
    wide = weight.to(torch.float32)
    norms = torch.linalg.vector_norm(wide, dim=1)
    errors = torch.linalg.vector_norm(wide - weight.to(torch.float16), dim=1)
    # Beyond float16's range the error is infinite.
    return bool((errors <= _MAX_ERROR * norms).all())
