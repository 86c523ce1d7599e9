"""Pages of ranks, put together, are those of a stage that is not split; and the other way round."""

from __future__ import annotations

import pytest
import torch
from support.paths import DEMO_MODEL

from stage_worker.kv_cache import KvCache, PlainKvCache
from stage_worker.packed_kv_cache import PackedKvCache
from stage_worker.ranked_pages import HeadLayout, blocks_from_bytes, bytes_of_blocks
from stage_worker.sharding import Shards
from stagemesh.model_spec import ModelSpec

SPEC = ModelSpec.from_directory(DEMO_MODEL)
NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE = 2, 5, 4
PLACES = [3, 0, 4]


def make_cache(spec: ModelSpec, kv_dtype: str) -> KvCache:
    sizes = NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE
    if kv_dtype == "float32":
        return PlainKvCache(spec, *sizes, torch.float32, torch.device("cpu"))
    return PackedKvCache(spec, *sizes, torch.float32, kv_dtype)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_pages_of_all_ranks(kv_dtype: str, size: int) -> None:
    assert SPEC.num_kv_heads == 4
    whole = make_cache(SPEC, kv_dtype)
    shards = [Shards(SPEC, rank, size) for rank in range(size)]
    parts = [make_cache(each.local_spec, kv_dtype) for each in shards]
    slots = torch.arange(NUM_BLOCKS * BLOCK_SIZE)
    generator = torch.Generator().manual_seed(0)
    for layer in range(NUM_LAYERS):
        shape = (len(slots), SPEC.num_kv_heads, SPEC.head_dim)
        keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
        whole.write(layer, slots, keys, values)
        for each, part in zip(shards, parts, strict=True):
            heads = slice(each.kv_heads.start, each.kv_heads.stop)
            part.write(layer, slots, keys[:, heads], values[:, heads])
    layout = HeadLayout.of(whole, SPEC.head_dim)
    pages = whole.read_blocks(PLACES)
    assert torch.equal(layout.join([part.read_blocks(PLACES) for part in parts]), pages)
    for each, part in zip(shards, parts, strict=True):
        own = layout.take(pages, each.kv_heads)
        assert bytes(bytes_of_blocks(part, PLACES)) == own.numpy().tobytes()
        other = make_cache(each.local_spec, kv_dtype)
        blocks_from_bytes(other, PLACES, bytearray(own.numpy().tobytes()))
        assert torch.equal(other.read_blocks(PLACES), own)
