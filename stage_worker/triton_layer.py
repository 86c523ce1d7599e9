"""Triton kernels: what a decoder layer does between its matrix products and attention.

    T tokens, E hidden size, I intermediate size; H query heads, K KV heads, D head dim

Each reads its input once and writes its output once. Arithmetic is in float32, rounded where a
result is stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS_PER_PROGRAM = 4
_GATE_BLOCK = 1024


@triton.jit
def _add_norm(
    hidden,  # [T, E]; the sum is stored here where ADD
    delta,  # [T, E] where ADD
    weight,  # [E]
    output,  # [T, E]
    eps,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ADD: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * E + tl.arange(0, BLOCK_E)
    columns = tl.arange(0, BLOCK_E)
    live = columns < E
    x = tl.load(hidden + at, mask=live, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta + at, mask=live, other=0.0).to(tl.float32)
        rounded = x.to(hidden.dtype.element_ty)
        tl.store(hidden + at, rounded, mask=live)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / E + eps)
    normed = (x * scale).to(output.dtype.element_ty).to(tl.float32)
    normed *= tl.load(weight + columns, mask=live, other=0.0).to(tl.float32)
    tl.store(output + at, normed.to(output.dtype.element_ty), mask=live)


@triton.jit
def _gate(
    gate_up,  # [T, 2 * I]
    output,  # [T, I]
    I: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    live = columns < I
    at = token * 2 * I + columns
    gate = tl.load(gate_up + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + I, mask=live, other=0.0).to(tl.float32)
    gated = (gate / (1.0 + tl.exp(-gate))).to(output.dtype.element_ty).to(tl.float32) * up
    tl.store(output + token * I + columns, gated.to(output.dtype.element_ty), mask=live)


@triton.jit
def _of_head(query_norm, key_norm, dims, is_query, HALF: tl.constexpr):
    """[heads, HALF]: the weights of a query's norm or of a key's."""
    for_query = tl.load(query_norm + dims, mask=dims < HALF, other=0.0).to(tl.float32)
    for_key = tl.load(key_norm + dims, mask=dims < HALF, other=0.0).to(tl.float32)
    return tl.where(is_query[:, None], for_query[None, :], for_key[None, :])


@triton.jit
def _rotate_and_write(
    heads,  # [T, H + 2 * K, D]: queries, keys, values
    cos,  # [T, D / 2] float32
    sin,
    slots,  # [T] int32; -1: keys and values are not written
    query_norm,  # [D] where NORM
    key_norm,
    queries,  # [T, H, D]
    keys,  # [N * O, K, D]
    values,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    NORM: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_HALF)
    live = (head < H + 2 * K)[:, None] & (dims < HALF)[None, :]
    at = (token * (H + 2 * K) + head[:, None]) * D + dims[None, :]
    first = tl.load(heads + at, mask=live, other=0.0).to(tl.float32)
    second = tl.load(heads + at + HALF, mask=live, other=0.0).to(tl.float32)
    is_query, is_key = head < H, (head >= H) & (head < H + K)
    is_value = head >= H + K
    stored = queries.dtype.element_ty
    if NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        weight = _of_head(query_norm, key_norm, dims, is_query, HALF)
        normed = (first * scale).to(stored).to(tl.float32) * weight
        first = tl.where(is_value[:, None], first, normed)
        weight = _of_head(query_norm + HALF, key_norm + HALF, dims, is_query, HALF)
        normed = (second * scale).to(stored).to(tl.float32) * weight
        second = tl.where(is_value[:, None], second, normed)
    angle = token * HALF + dims
    c = tl.load(cos + angle, mask=dims < HALF, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=dims < HALF, other=0.0)[None, :]
    turned_first = (first * c - second * s).to(stored)
    turned_second = (second * c + first * s).to(stored)
    to = (token * H + head[:, None]) * D + dims[None, :]
    tl.store(queries + to, turned_first, mask=is_query[:, None] & live)
    tl.store(queries + to + HALF, turned_second, mask=is_query[:, None] & live)
    slot = tl.load(slots + token).to(tl.int64)
    written = live & (slot >= 0)
    to = (slot * K + (head - H)[:, None]) * D + dims[None, :]
    tl.store(keys + to, turned_first, mask=is_key[:, None] & written)
    tl.store(keys + to + HALF, turned_second, mask=is_key[:, None] & written)
    to = (slot * K + (head - H - K)[:, None]) * D + dims[None, :]
    tl.store(values + to, first.to(stored), mask=is_value[:, None] & written)
    tl.store(values + to + HALF, second.to(stored), mask=is_value[:, None] & written)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [T, E] -> RMS norm of each row times `weight` [E]."""
    return _norm(x, None, weight, eps)


def add_norm(hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds `delta` [T, E] to `hidden` in place; the norm of the sum."""
    return _norm(hidden, delta, weight, eps)


def _norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    num_tokens, size = hidden.shape
    output = torch.empty_like(hidden)
    grid: Any = (num_tokens,)
    _add_norm[grid](
        hidden,
        hidden if delta is None else delta,
        weight,
        output,
        eps,
        E=size,
        BLOCK_E=triton.next_power_of_2(size),
        ADD=delta is not None,
        num_warps=8 if size >= 2048 else 4,
    )
    return output


def gate(gate_up: Tensor) -> Tensor:
    """[T, 2 * I] -> [T, I]: silu of the first half times the second."""
    num_tokens, double = gate_up.shape
    output = gate_up.new_empty(num_tokens, double // 2)
    grid: Any = (num_tokens, triton.cdiv(double // 2, _GATE_BLOCK))
    _gate[grid](gate_up, output, I=double // 2, BLOCK_I=_GATE_BLOCK, num_warps=4)
    return output


def rotate_and_write(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """heads: [T, H + 2 * K, D] -> queries [T, H, D], normed and rotated.

    The keys, likewise, and the values are written to their pages. `norms`: query's and key's.
    """
    num_tokens, num_all, head_dim = heads.shape
    num_kv_heads = keys.shape[2]
    num_heads = num_all - 2 * num_kv_heads
    queries = heads.new_empty(num_tokens, num_heads, head_dim)
    query_norm, key_norm = norms if norms is not None else (heads, heads)
    grid: Any = (num_tokens, triton.cdiv(num_all, _HEADS_PER_PROGRAM))
    _rotate_and_write[grid](
        heads,
        cos,
        sin,
        slots,
        query_norm,
        key_norm,
        queries,
        keys,
        values,
        eps,
        H=num_heads,
        K=num_kv_heads,
        D=head_dim,
        BLOCK_H=_HEADS_PER_PROGRAM,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        NORM=norms is not None,
        num_warps=4,
    )
    return queries
