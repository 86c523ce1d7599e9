"""The decoder: one forward pass of a stage's layers over the flat tokens of a step.

    T tokens of all rows, one after another; W of them are written
    E hidden size; I intermediate size; H query heads, K KV heads, D head dim, V vocabulary

One decoder for all families: what differs is in the weights that are there (biases, norms), in the
batch's metadata (angles, windows) and in the factors of the spec. Knows nothing of sequences or
steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stage_worker.attention import Attention
from stage_worker.capped_attention import cap_in_place
from stage_worker.collectives import ALONE, Group
from stage_worker.experts import SparseMlp
from stage_worker.kernels import Kernels
from stage_worker.kv_cache import KvCache
from stage_worker.linear import Linear
from stage_worker.lora import StepAdapters
from stage_worker.norms import RmsNorm
from stage_worker.rope import rotate
from stage_worker.sharding import Shards
from stage_worker.vocabulary import Vocabulary
from stage_worker.weights import LayerWeights, StageWeights
from stagemesh.model_spec import ModelSpec

Turn = tuple[Tensor, Tensor]
"""What `rotate` takes, in the model's dtype: cos and sin [T, 1, P] of P rotated dimensions."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What a forward pass must know of its tokens, built once per step.

    `slots` [T] is where their keys and values lie; those of `written` [W] (None: of all) are
    written there, at `written_slots` [W], and the pages hold the others' already. `turns` are by
    number of the rope; `reading` has what the attention kernel planned per sliding window (None:
    whole context). `token_ids` [T] are there on the first stage, `adapters` where a row has one.
    """

    slots: Tensor
    written_slots: Tensor
    written: Tensor | None
    turns: Mapping[int, Turn]
    reading: Mapping[int | None, Any]
    token_ids: Tensor | None = None
    adapters: StepAdapters | None = None


class Decoder:
    """`windows` are those of the stage's own layers, `ropes` the numbers of theirs (None: none).

    As a rank of a group it computes its part of each layer (`spec` and `shards` say which), and
    the group sums what the parts give; hidden states are the same on every rank.
    """

    def __init__(
        self,
        spec: ModelSpec,
        windows: Sequence[int | None],
        ropes: Sequence[int | None],
        weights: StageWeights,
        cache: KvCache,
        kernels: Kernels,
        dtype: torch.dtype,
        shards: Shards | None = None,
        group: Group = ALONE,
    ) -> None:
        self._spec = spec
        self._group = group
        self._norm = RmsNorm(spec)
        self._vocabulary = Vocabulary(shards or Shards(spec), group)
        self._windows = windows
        self._ropes = ropes
        self._weights = weights
        self._cache = cache
        self._kernels = kernels
        self._dtype = dtype
        # Rounded to the type, as models were trained: Gemma's is no power of two.
        self._embedding_scale = float(torch.tensor(spec.scales.embedding, dtype=dtype))

    @property
    def attention(self) -> Attention[Any]:
        """Plans the reading of a batch."""
        return self._kernels.attention

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, E]; on the first stage."""
        assert self._weights.embedding is not None
        embedded = self._vocabulary.look_up(self._weights.embedding, token_ids, self._dtype)
        return embedded if self._embedding_scale == 1.0 else embedded.mul_(self._embedding_scale)

    def forward(self, hidden: Tensor | None, batch: Batch) -> Tensor:
        """[T, E] -> [T, E] through the stage's layers; writes their KV. Without input the batch's
        token ids are embedded."""
        if hidden is None:
            assert batch.token_ids is not None
            hidden = self.embed(batch.token_ids)
        for i, layer in enumerate(self._weights.layers):
            attended = self._attention(self._norm(hidden, layer.input_norm), i, layer, batch)
            hidden += self._addend(self._group.all_reduce(attended), layer.attended_norm)
            output = self._mlp(self._norm(hidden, layer.mlp_norm), i, layer, batch)
            hidden += self._addend(self._group.all_reduce(output), layer.mlp_output_norm)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor | None:
        """[T, E] -> [T, V] float32; on the last stage. None on ranks but the first."""
        return self._vocabulary.gathered(self._own_logits(hidden))

    def greedy(self, hidden: Tensor) -> list[int]:
        """[T, E] -> the likeliest token of each, -1 where numbers are not finite."""
        return self._vocabulary.greedy(self._own_logits(hidden))

    def _own_logits(self, hidden: Tensor) -> Tensor:
        """Of the tokens that are this rank's."""
        assert self._weights.norm is not None
        assert self._weights.head is not None
        logits = self._weights.head(self._norm(hidden, self._weights.norm)).float()
        if self._spec.scales.logits != 1.0:
            logits.div_(self._spec.scales.logits)
        if self._spec.scales.logit_cap is not None:
            cap_in_place(logits, self._spec.scales.logit_cap)
        return logits

    def _attention(self, hidden: Tensor, i: int, layer: LayerWeights, batch: Batch) -> Tensor:
        spec = self._spec
        heads = _adapted(layer.qkv, i, "qkv", hidden, batch).view(len(hidden), -1, spec.head_dim)
        turned, values = heads.tensor_split([spec.num_heads + spec.num_kv_heads], dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            turned = self._normed(turned, layer.query_norm, layer.key_norm)
        rope = self._ropes[i]
        if rope is not None:
            turned = rotate(turned, *batch.turns[rope])
        queries, keys = turned.tensor_split([spec.num_heads], dim=1)
        self._write(i, batch, keys, values)
        plan = batch.reading[self._windows[i]]
        attended = self._kernels.attention.attend(queries, plan, self._cache, i, layer.sinks)
        return _adapted(layer.output, i, "output", attended, batch)

    def _normed(self, turned: Tensor, query_norm: Tensor, key_norm: Tensor) -> Tensor:
        """Queries and keys, [T, H + K, D]: each head of them, or all heads together of either."""
        queries, keys = turned.tensor_split([self._spec.num_heads], dim=1)
        if not self._spec.norms.projections:
            return torch.cat((self._norm(queries, query_norm), self._norm(keys, key_norm)), dim=1)
        projections = queries.flatten(1), keys.flatten(1)
        normed = self._norm.over_ranks(projections, (query_norm, key_norm), self._group)
        return torch.cat(normed, dim=1).view(turned.shape)

    def _mlp(self, x: Tensor, i: int, layer: LayerWeights, batch: Batch) -> Tensor:
        if batch.adapters is None or isinstance(layer.mlp, SparseMlp):
            return layer.mlp(x, self._kernels.gate)
        return layer.mlp(x, self._kernels.gate, partial(batch.adapters.add, i))

    def _addend(self, output: Tensor, norm: Tensor | None) -> Tensor:
        """What attention or the feed-forward part adds to the hidden states: [T, E]."""
        added = self._norm(output, norm)
        residual = self._spec.scales.residual
        return added if residual == 1.0 else added.mul_(residual)

    def _write(self, i: int, batch: Batch, keys: Tensor, values: Tensor) -> None:
        if batch.written is not None:
            keys, values = keys[batch.written], values[batch.written]
        self._cache.write(i, batch.written_slots, keys, values)


def _adapted(linear: Linear, layer: int, slot: str, x: Tensor, batch: Batch) -> Tensor:
    """[T, I] -> [T, O], with what the tokens' adapters add."""
    y = linear(x)
    if batch.adapters is not None:
        batch.adapters.add(layer, slot, x, y)
    return y
