"""What keys and values become in pages of another type: how far off, of what alone, how large."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from support.paths import DEMO_MODEL
from torch import Tensor

from stage_worker.kv_cache import KvCache, PlainKvCache, block_bytes
from stage_worker.kv_dtype import KV_DTYPES, resolve_kv_dtype
from stage_worker.options import WorkerOptions
from stage_worker.packed_kv_cache import PackedKvCache
from stagemesh.errors import ConfigError
from stagemesh.model_spec import ModelSpec

HEADS, DIM, BLOCK = 3, 10, 4
SPEC = cast(ModelSpec, SimpleNamespace(num_kv_heads=HEADS, head_dim=DIM))
# Of a vector's largest number, for int8; of each number, for floats.
ERRORS = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11, "int8": 0.5 / 127}


def cache_of(kv_dtype: str, dtype: torch.dtype = torch.float32) -> KvCache:
    if kv_dtype == "auto":
        return PlainKvCache(SPEC, 2, 8, BLOCK, dtype, torch.device("cpu"))
    return PackedKvCache(SPEC, 2, 8, BLOCK, dtype, kv_dtype)


def some_kv(num_tokens: int = 9) -> tuple[Tensor, Tensor]:
    """Heads and tokens of very different sizes."""
    generator = torch.Generator().manual_seed(3)
    sizes = 10.0 ** torch.randint(-3, 4, (2, num_tokens, HEADS, 1), generator=generator)
    keys, values = torch.randn((2, num_tokens, HEADS, DIM), generator=generator) * sizes
    return keys, values


def passed(cache: KvCache, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Through slots of the second layer, in no order."""
    slots = torch.tensor([30, 2, 17, 9, 1, 25, 12, 6, 20])[: len(keys)]
    cache.write(1, slots, keys, values)
    read_keys, read_values = cache.read(1, slots[None])
    return read_keys[0], read_values[0]


@pytest.mark.parametrize("kv_dtype", ERRORS)
def test_a_number_is_off_by_little(kv_dtype: str) -> None:
    written = some_kv()
    for before, after in zip(written, passed(cache_of(kv_dtype), *written), strict=True):
        size = before.abs().amax(dim=2, keepdim=True) if kv_dtype == "int8" else before.abs()
        smallest_step = 2.0**-24 if kv_dtype == "float16" else 0.0
        most = torch.clamp(1.001 * ERRORS[kv_dtype] * size, min=smallest_step / 2)
        assert ((after - before).abs() <= most).all()
        assert torch.equal(after, before) == (kv_dtype == "float32")


@pytest.mark.parametrize("kv_dtype", ERRORS)
def test_what_a_token_becomes_depends_on_it_alone(kv_dtype: str) -> None:
    keys, values = some_kv()
    together = passed(cache_of(kv_dtype), keys, values)
    for i in range(len(keys)):
        alone = passed(cache_of(kv_dtype), keys[i : i + 1], values[i : i + 1])
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_of_them[i])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kv_dtype", ERRORS)
def test_what_is_not_finite_stays_so_and_alone(kv_dtype: str, value: float) -> None:
    keys, values = some_kv()
    values[4, 1, 7] = value
    got_keys, got_values = passed(cache_of(kv_dtype), keys, values)
    assert torch.isfinite(got_keys).all()
    broken = (~torch.isfinite(got_values)).any(dim=2).nonzero().tolist()
    assert broken == [[4, 1]]


def test_too_large_for_16_bits_is_not_silent() -> None:
    keys, values = some_kv()
    keys[0, 0, 0] = 1e5
    assert torch.isinf(passed(cache_of("float16"), keys, values)[0][0, 0, 0])
    assert torch.isfinite(passed(cache_of("bfloat16"), keys, values)[0]).all()


@pytest.mark.parametrize("kv_dtype", ERRORS)
def test_zeros_and_the_smallest_numbers(kv_dtype: str) -> None:
    keys, values = torch.zeros(2, 9, HEADS, DIM)
    values[3] = 1e-44
    got_keys, got_values = passed(cache_of(kv_dtype), keys, values)
    assert (got_keys == 0).all()
    assert (got_values.abs() <= 1e-37).all()


@pytest.mark.parametrize("kv_dtype", ERRORS)
def test_what_is_computed_in_bfloat16(kv_dtype: str) -> None:
    keys, values = (numbers.bfloat16() for numbers in some_kv())
    for before, after in zip(
        (keys, values), passed(cache_of(kv_dtype, torch.bfloat16), keys, values), strict=True
    ):
        assert after.dtype == torch.bfloat16
        size = before.float().abs().amax(dim=2, keepdim=True)
        assert ((after.float() - before.float()).abs() <= 0.007 * size).all()
        if kv_dtype in ("float32", "bfloat16"):
            assert torch.equal(after, before)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_block_takes_what_its_memory_does(kv_dtype: str) -> None:
    cache = cache_of(kv_dtype)
    assert cache.block_bytes == sum(pages[0].nbytes for pages in cache.memory)
    assert cache.block_bytes == block_bytes(SPEC, 2, BLOCK, cache.kv_dtype)
    assert cache.read_blocks([3, 5]).shape == (2, cache.block_bytes)


def test_what_auto_is() -> None:
    assert resolve_kv_dtype("auto", "bfloat16", "cpu") == "bfloat16"
    assert resolve_kv_dtype("auto", "bfloat16", "cuda:1") == "bfloat16"
    assert resolve_kv_dtype("bfloat16", "bfloat16", "cuda") == "bfloat16"
    assert resolve_kv_dtype("int8", "float32", "cpu") == "int8"


def test_a_gpu_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--kv-dtype int8 needs device cpu"):
        resolve_kv_dtype("int8", "bfloat16", "cuda")
    options = WorkerOptions(model=DEMO_MODEL, device="cuda:0", kv_dtype="int8")
    with pytest.raises(ConfigError, match="--kv-dtype int8 needs device cpu: on cuda:0"):
        options.resolved_kv_dtype("bfloat16")


def test_unknown_types_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--kv-dtype"):
        WorkerOptions(model=DEMO_MODEL, kv_dtype="int4")
