"""The Triton kernels against plain arithmetic in float32: with a CUDA device, or by Triton's
interpreter where TRITON_INTERPRET=1."""

from __future__ import annotations

import itertools
import os
import random

import pytest
import torch
from support.paths import DEMO_MODEL
from torch import Tensor

from stagemesh.model_spec import ModelSpec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Query heads, KV heads, head dim, block size.
SIZES = [(4, 2, 16, 8), (6, 2, 20, 5), (8, 8, 64, 16), (32, 8, 128, 16)]
NUM_BLOCKS, TABLE_BLOCKS = 70, 60


def random_pages(
    sizes: tuple[int, int, int, int], num_rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values, and block tables in a shuffled order."""
    _, num_kv_heads, head_dim, block_size = sizes
    shape = (NUM_BLOCKS, block_size, num_kv_heads, head_dim)
    keys, values = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    tables = torch.stack([torch.randperm(NUM_BLOCKS)[:TABLE_BLOCKS] for _ in range(num_rows)])
    return keys, values, tables.int().to(DEVICE)


def offsets_of(tables: Tensor) -> Tensor:
    """Where each row's table begins among all entries."""
    return torch.arange(len(tables), dtype=torch.int32, device=DEVICE) * tables.shape[1]


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, table: Tensor, start: int, window: int | None
) -> Tensor:
    """queries [n, H, D] at positions from `start` on, in float32."""
    num_queries, num_heads, head_dim = queries.shape
    num_slots = start + num_queries
    positions = torch.arange(num_slots, device=DEVICE)
    slots = table[positions // keys.shape[1]].long() * keys.shape[1] + positions % keys.shape[1]
    group = num_heads // keys.shape[2]
    k, v = (x.flatten(0, 1)[slots].float().repeat_interleave(group, 1) for x in (keys, values))
    at = start + torch.arange(num_queries, device=DEVICE)[:, None]
    seen = positions <= at
    if window is not None:
        seen &= positions > at - window
    scores = torch.einsum("qhd,nhd->hqn", queries.float(), k) / head_dim**0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqn,nhd->qhd", weights, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_decode(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    from stage_worker.triton_decode import decode_attention, decode_scratch

    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim, block_size = sizes
    lengths = [length for length in (1, 63, 64, 200, 290) if length <= block_size * TABLE_BLOCKS]
    keys, values, tables = random_pages(sizes, len(lengths), dtype)
    queries = torch.randn(len(lengths), num_heads + 3, head_dim, device=DEVICE).to(dtype)
    queries = queries[:, :num_heads]
    for size in (50, 10_000):
        items: list[list[int]] = []
        firsts = []
        for row, length in enumerate(lengths):
            starts = range(0, length, size)
            firsts.append(len(items))
            items += [[row, a, min(a + size, length), len(starts)] for a in starts]
        items.append([-1, 0, 0, 0])
        device = torch.device(DEVICE)
        scratch = decode_scratch(
            len(items), len(lengths), num_heads, num_kv_heads, head_dim, device
        )
        for _ in range(2):  # the second finds the counters as the first left them
            output = torch.full(
                (len(lengths), num_heads, head_dim), 9.0, device=DEVICE, dtype=dtype
            )
            decode_attention(
                queries,
                keys,
                values,
                tables.flatten(),
                offsets_of(tables),
                torch.tensor(items, dtype=torch.int32, device=DEVICE),
                torch.tensor(firsts, dtype=torch.int32, device=DEVICE),
                scratch,
                output,
            )
            for row, length in enumerate(lengths):
                expected = attention(
                    queries[row : row + 1], keys, values, tables[row], length - 1, None
                )
                assert float((output[row] - expected[0]).abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 9, 100])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_prefill(sizes: tuple[int, int, int, int], window: int | None, dtype: torch.dtype) -> None:
    from stage_worker.triton_prefill import prefill_attention, tokens_per_tile

    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim, _ = sizes
    rows = [(0, 70), (33, 5), (100, 64), (180, 1)]  # start, tokens
    keys, values, tables = random_pages(sizes, len(rows), dtype)
    num_tokens = sum(count for _, count in rows)
    queries = torch.randn(num_tokens, num_heads + 3, head_dim, device=DEVICE).to(dtype)
    queries = queries[:, :num_heads]
    size = tokens_per_tile(num_heads, num_kv_heads, head_dim, dtype.itemsize)
    tiles = []
    first = 0
    for row, (start, count) in enumerate(rows):
        tiles += [[row, first + i, start + i, min(size, count - i)] for i in range(0, count, size)]
        first += count
    output = torch.full((num_tokens, num_heads, head_dim), 9.0, device=DEVICE, dtype=dtype)
    tile_tensor = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
    prefill_attention(
        queries, keys, values, tables.flatten(), offsets_of(tables), tile_tensor, window, output
    )
    first = 0
    for row, (start, count) in enumerate(rows):
        own = slice(first, first + count)
        expected = attention(queries[own], keys, values, tables[row], start, window)
        assert float((output[own] - expected).abs().max()) < TOLERANCE[dtype]
        first += count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("early", [False] if INTERPRETED else [False, True])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(20, 100), (33, 1500), (512, 4096)])
def test_matvec(num_outputs: int, num_inputs: int, early: bool, dtype: torch.dtype) -> None:
    from stage_worker.triton_matvec import matvec

    torch.manual_seed(0)
    x, norm = (torch.randn(num_inputs, device=DEVICE).to(dtype) for _ in range(2))
    addend, output = (torch.randn(num_outputs, device=DEVICE).to(dtype) for _ in range(2))
    weight = (torch.randn(2 * num_outputs, num_inputs, device=DEVICE) / num_inputs**0.5).to(dtype)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean() + 1e-5) * norm.float()
    plain = weight[:num_outputs]
    cases = [
        (matvec(x, plain, output.clone(), early=early), plain.float() @ wide),
        (
            matvec(x, plain, addend.clone(), norm=norm, addend=addend, eps=1e-5, early=early),
            plain.float() @ normed + addend.float(),
        ),
    ]
    gate, up = (weight.float() @ normed).chunk(2)
    gated = matvec(x, weight, output.clone(), norm=norm, gated=True, eps=1e-5, early=early)
    cases.append((gated, torch.nn.functional.silu(gate) * up))
    for got, expected in cases:
        difference = (got.float() - expected).abs() / (1 + expected.abs())
        assert float(difference.max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 100), (2, 4096)], ids=str)
def test_norms_and_gate(size: tuple[int, int], dtype: torch.dtype) -> None:
    from stage_worker.triton_layer import add_norm, gate, norm

    torch.manual_seed(0)
    hidden, delta = (torch.randn(size, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.randn(size[1], device=DEVICE).to(dtype)
    both = torch.randn(size[0], 2 * size[1], device=DEVICE).to(dtype)
    assert _differ(norm(hidden, weight, 1e-5), _normed(hidden, weight)) < TOLERANCE[dtype]
    added = (hidden.float() + delta.float()).to(dtype)
    assert _differ(add_norm(hidden, delta, weight, 1e-5), _normed(added, weight)) < TOLERANCE[dtype]
    assert torch.equal(hidden, added)
    first, second = both.float().chunk(2, dim=1)
    assert _differ(gate(both), torch.nn.functional.silu(first) * second) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rotation(sizes: tuple[int, int, int, int], normed: bool, dtype: torch.dtype) -> None:
    from stage_worker.rope import both_halves, rotate
    from stage_worker.triton_layer import rotate_and_write

    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim, _ = sizes
    heads = torch.randn(5, num_heads + 2 * num_kv_heads, head_dim, device=DEVICE).to(dtype)
    angle = torch.randn(5, 1, head_dim // 2, device=DEVICE)
    norms = tuple(torch.randn(head_dim, device=DEVICE).to(dtype) for _ in range(2))
    keys, values, _ = random_pages(sizes, 1, dtype)
    slots = torch.tensor([7, 0, -1, 30, 12], dtype=torch.int32, device=DEVICE)
    before = keys.clone(), values.clone()
    found = rotate_and_write(
        heads, angle.cos(), angle.sin(), slots, keys, values, norms if normed else None, 1e-5
    )
    parts = torch.split(heads.float(), [num_heads, num_kv_heads, num_kv_heads], dim=1)
    queries, new_keys = (
        rotate(_normed(x, norm) if normed else x, *both_halves(angle.cos(), angle.sin()))
        for x, norm in zip(parts, norms, strict=False)
    )
    assert _differ(found, queries) < TOLERANCE[dtype]
    written = (slots >= 0).nonzero().flatten()
    for pages, old, new in zip((keys, values), before, (new_keys, parts[2]), strict=True):
        expected = old.flatten(0, 1).float()
        expected[slots[written].long()] = new[written]
        assert _differ(pages.flatten(0, 1), expected) < TOLERANCE[dtype]


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.float()


def _differ(found: Tensor, expected: Tensor) -> float:
    return float(((found.float() - expected).abs() / (1 + expected.abs())).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [300, 9000])
def test_likeliest_tokens(vocab: int, dtype: torch.dtype) -> None:
    from stage_worker.sampler import greedy_tokens
    from stage_worker.triton_greedy import likeliest

    torch.manual_seed(0)
    logits = torch.randn(7, vocab, device=DEVICE).to(dtype)
    logits[1, 17] = logits[1, 200] = logits[1].max() + 1  # of equal ones the lowest
    logits[2, 3], logits[3, -1], logits[4, 5] = float("nan"), float("inf"), -float("inf")
    logits[5] = -logits[5].abs() - 1  # nothing is above what is padded
    found = likeliest(logits).tolist()
    assert found == greedy_tokens(logits.float())
    assert found[1:5] == [17, -1, -1, -1]


def test_items_cover_every_context_once() -> None:
    from stage_worker.cuda_attention import CudaAttention, Span

    spec = ModelSpec.from_directory(DEMO_MODEL)
    attention = CudaAttention(spec, torch.float32, torch.device(DEVICE))
    generator = random.Random(0)
    for num_rows, longest, window in itertools.product(
        (1, 3, 20, 200), (300, 40000), (None, 100, 1000)
    ):
        rows = [Span(i, 1, generator.randrange(longest)) for i in range(num_rows)]
        numbers, firsts = attention.plan_items(rows, window)
        items = torch.tensor(numbers).view(-1, 4)
        assert len(items) <= attention.max_items(num_rows)
        for row, first in zip(rows, firsts, strict=True):
            own = items[first : first + items[first, 3]]
            assert (own[:, 0] == row.first).all()
            assert (own[:, 3] == len(own)).all()
            assert own[0, 1] == (0 if window is None else max(0, row.start + 1 - window))
            assert own[-1, 2] == row.start + 1
            assert (own[1:, 1] == own[:-1, 2]).all()
            assert (own[:, 1] < own[:, 2]).all()
