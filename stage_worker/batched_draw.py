"""Draws the tokens of many rows at once, where a device is slow to start and slow to be asked.

    R rows, V vocabulary

For a GPU: there an element's bits do not depend on where in a tensor it lies, as they may on a CPU.
Rows with filters are not drawn here. docs/sampling.md defines what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stage_worker.noise import gumbel_rows
from stagemesh.sampling import SamplingSpec

# Rows whose float64 numbers are held at once: several times 8 V bytes each.
_MAX_ROWS = 32


def is_unfiltered(spec: SamplingSpec) -> bool:
    """Whether every token is a candidate of a draw."""
    return spec.temperature > 0 and not spec.top_k and spec.top_p >= 1.0 and spec.min_p <= 0.0


def draw_rows(logprobs: Tensor, temperatures: Sequence[float], streams: Sequence[int]) -> list[int]:
    """logprobs: [R, V] -> the token of each row; nothing is promised of rows with NaN."""
    tokens: list[Tensor] = []
    for start in range(0, len(logprobs), _MAX_ROWS):
        end = start + _MAX_ROWS
        part = logprobs[start:end]
        heat = torch.tensor(temperatures[start:end], dtype=torch.float64, device=part.device)
        scaled = (part - part.amax(dim=1, keepdim=True)).double() / heat[:, None]
        ids = torch.arange(part.shape[1], device=part.device)
        noisy = scaled.add_(gumbel_rows(streams[start:end], ids))
        tokens.append(noisy.argmax(dim=1))  # the lowest id of equal ones
    drawn: list[int] = torch.cat(tokens).tolist() if tokens else []
    return drawn
