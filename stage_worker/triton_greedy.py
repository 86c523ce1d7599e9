"""Triton kernel: the likeliest token of each row of logits, read once.

R rows, V vocabulary, N pieces of it
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIECE = 4096


@triton.jit
def _best_of_piece(
    logits,  # [R, V]
    values,  # [R, N] float32: the largest
    tokens,  # [R, N] int32: the lowest id that has it, -1 where a number is not finite
    V: tl.constexpr,
    N: tl.constexpr,
    PIECE: tl.constexpr,
):
    row, piece = tl.program_id(0), tl.program_id(1)
    ids = piece * PIECE + tl.arange(0, PIECE)
    live = ids < V
    x = tl.load(logits + row.to(tl.int64) * V + ids, mask=live, other=0.0).to(tl.float32)
    # Also false for NaN.
    wrong = tl.sum(tl.where(tl.abs(x) <= 3.4028234e38, 0, 1))
    x = tl.where(live, x, -float("inf"))
    largest = tl.max(x)
    token = tl.min(tl.where(x == largest, ids, V))
    tl.store(values + row * N + piece, largest)
    tl.store(tokens + row * N + piece, tl.where(wrong > 0, -1, token))


@triton.jit
def _best_of_row(
    values,
    tokens,
    output,  # [R] int32
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, pieces = tl.program_id(0), tl.arange(0, BLOCK_N)
    live = pieces < N
    value = tl.load(values + row * N + pieces, mask=live, other=-float("inf"))
    token = tl.load(tokens + row * N + pieces, mask=live, other=2147483647)
    wrong = tl.min(token) < 0
    best = tl.min(tl.where(live & (value == tl.max(value)), token, 2147483647))
    tl.store(output + row, tl.where(wrong, -1, best))


def likeliest(logits: Tensor) -> Tensor:
    """logits: [R, V] -> [R] int32: of equal ones the lowest id; -1 where numbers are not finite."""
    num_rows, vocab = logits.shape
    num_pieces = triton.cdiv(vocab, _PIECE)
    values = torch.empty(num_rows, num_pieces, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(num_rows, num_pieces, dtype=torch.int32, device=logits.device)
    output = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    grid: Any = (num_rows, num_pieces)
    _best_of_piece[grid](logits, values, tokens, V=vocab, N=num_pieces, PIECE=_PIECE, num_warps=8)
    rows: Any = (num_rows,)
    block = triton.next_power_of_2(num_pieces)
    _best_of_row[rows](values, tokens, output, N=num_pieces, BLOCK_N=block, num_warps=1)
    return output
