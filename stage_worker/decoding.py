"""What executes a stage's passes: a builder of batches, and the decoder that takes them.

Which of them a stage has depends on its device only. Kernels of a device are not imported before a
stage is loaded on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from stage_worker.batch import BatchBuilder, PlacedRow
from stage_worker.collectives import ALONE, Group
from stage_worker.decoder import Decoder
from stage_worker.kernels import Kernels
from stage_worker.kv_cache import KvCache, PlainKvCache
from stage_worker.lora import StageAdapters
from stage_worker.rope import inverse_frequencies
from stage_worker.sharding import Shards
from stage_worker.weights import StageWeights
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import Span


class StageBatch(Protocol):
    @property
    def slots(self) -> Tensor:
        """[T] int64: where the keys and values of the pass's tokens lie."""
        ...


B_co = TypeVar("B_co", bound=StageBatch, covariant=True)
B_contra = TypeVar("B_contra", bound=StageBatch, contravariant=True)


class Batches(Protocol[B_co]):
    def build(self, placed: Sequence[PlacedRow], stage: int) -> B_co:
        """The pass of `placed`, at least one row, on the stage of this number."""
        ...


class StageDecoder(Protocol[B_contra]):
    def forward(self, hidden: Tensor | None, batch: B_contra) -> Tensor:
        """[T, E], which may be changed -> [T, E] through the stage's layers; writes their KV.

        On the first stage there is no input: it embeds the batch's token ids. The result may be
        overwritten by the next call.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor | None:
        """[T, E] -> [T, V] float32; on the last stage. None on ranks but the first."""
        ...

    def greedy(self, hidden: Tensor) -> list[int]:
        """[T, E] -> the likeliest token of each, -1 where numbers are not finite."""
        ...


@dataclass(frozen=True, slots=True)
class Decoding:
    """A decoder and the builder of what it takes."""

    batches: Batches[Any]
    decoder: StageDecoder[Any]


def make_decoding(
    spec: ModelSpec,
    span: Span,
    weights: StageWeights,
    cache: KvCache,
    kernels: Kernels,
    dtype: torch.dtype,
    adapters: StageAdapters,
    shards: Shards | None = None,
    group: Group = ALONE,
) -> Decoding:
    """For the device that the cache's pages are on; ready to take steps."""
    windows = spec.layer_windows[span.start : span.end]
    ropes = spec.layer_ropes[span.start : span.end]
    if cache.device.type == "cuda":
        assert isinstance(cache, PlainKvCache)
        assert group.size == 1, "options refuse it"
        return cuda_decoding(spec, windows, weights, cache, dtype)
    attention = kernels.attention
    batches = BatchBuilder(windows, spec.ropes, ropes, attention, cache, dtype, adapters)
    decoder = Decoder(spec, windows, ropes, weights, cache, kernels, dtype, shards, group)
    return Decoding(batches, decoder)


def cuda_decoding(
    spec: ModelSpec,
    windows: Sequence[int | None],
    weights: StageWeights,
    cache: PlainKvCache,
    dtype: torch.dtype,
) -> Decoding:
    from stage_worker.cuda_decoder import CudaDecoder

    decoder = CudaDecoder(spec, windows, weights, cache, dtype)
    decoder.prepare(inverse_frequencies(spec.rope, spec.head_dim, 0))
    return Decoding(decoder.batch_builder(), decoder)
