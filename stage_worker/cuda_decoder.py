"""The decoder on a CUDA device: what `stage_worker.decoder` computes, in kernels of its own.

    T tokens of all rows, one after another
    E hidden size; H query heads, K KV heads, D head dim, V vocabulary

Between the matrix products, which are torch's, there is one kernel where the other decoder has
several operations. For a lone token the products are kernels of ours as well, with norms, gate and
residual in them, since nothing counts there but the bandwidth at which weights are read. Results
are rounded less often than there, so half precision differs in the last bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stage_worker.cuda_attention import CudaAttention, Scratch
from stage_worker.cuda_batch import CudaBatch, CudaBatchBuilder
from stage_worker.cuda_graphs import GRAPH_SIZES, MAX_TABLE_ENTRIES, DecodeGraphs
from stage_worker.cuda_layout import DeviceBatch, Layout
from stage_worker.experts import DenseMlp
from stage_worker.kv_cache import PlainKvCache
from stage_worker.linear import Linear, PlainLinear
from stage_worker.rope import angles
from stage_worker.staging import to_device
from stage_worker.triton_greedy import likeliest
from stage_worker.triton_layer import add_norm, gate, norm, rotate_and_write
from stage_worker.triton_matvec import matvec, supports_early
from stage_worker.weights import LayerWeights, StageWeights
from stagemesh.model_spec import ModelSpec


class CudaDecoder:
    """`windows` are those of the stage's own layers."""

    def __init__(
        self,
        spec: ModelSpec,
        windows: Sequence[int | None],
        weights: StageWeights,
        cache: PlainKvCache,
        dtype: torch.dtype,
        *,
        use_graphs: bool = True,
    ) -> None:
        self._spec = spec
        self._windows = tuple(windows)
        self._weights = weights
        self._cache = cache
        self._dtype = dtype
        self._device = cache.device
        self._early = self._device.type == "cuda" and supports_early(self._device)
        self._attention = CudaAttention(spec, dtype, self._device)
        self._shared_frequencies = not spec.rope.depends_on_length
        self._frequencies: Tensor | None = None
        # Where sequences differ in their frequencies, a graph would have to be given them.
        sizes = GRAPH_SIZES if self._shared_frequencies else ()
        layouts = [self._layout(size) for size in sizes]
        self._graphs: DecodeGraphs | None = None
        if layouts:
            hidden_size = spec.hidden_size if weights.embedding is None else None
            self._graphs = DecodeGraphs(self._layers, layouts, hidden_size, dtype, self._device)
        self._use_graphs = use_graphs and self._device.type == "cuda"

    def prepare(self, frequencies: Tensor) -> None:
        """Captures the graphs; `frequencies` [D / 2] are those that all sequences have."""
        self._frequencies = frequencies.to(self._device)
        if self._graphs is not None and self._use_graphs:
            self._graphs.capture()

    def batch_builder(self) -> CudaBatchBuilder:
        """Builds the batches that `forward` takes."""
        return CudaBatchBuilder(
            self._windows,
            self._attention,
            self._cache.block_size_tokens,
            GRAPH_SIZES if self._graphs is not None else (),
            MAX_TABLE_ENTRIES,
            shared_frequencies=self._shared_frequencies,
            device=self._device,
        )

    def forward(self, hidden: Tensor | None, batch: CudaBatch) -> Tensor:
        """As a `StageDecoder` does it."""
        if batch.graph_size is not None and self._graphs is not None:
            output = self._graphs.run(hidden, batch.metadata, batch.graph_size)
            return output[: len(batch.row_slots)]
        if not self._shared_frequencies:
            self._frequencies = batch.frequencies.to(self._device)
        metadata = to_device(batch.metadata, self._device)
        return self._layers(hidden, batch.layout.views(metadata))

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, E] -> [T, V] float32; on the last stage."""
        return self._products(hidden).float()

    def greedy(self, hidden: Tensor) -> list[int]:
        """[T, E] -> the likeliest token of each, -1 where numbers are not finite."""
        tokens: list[int] = likeliest(self._products(hidden)).tolist()
        return tokens

    def _products(self, hidden: Tensor) -> Tensor:
        """Logits in the dtype that is computed with."""
        final, head = self._weights.norm, self._weights.head
        assert final is not None
        assert head is not None
        eps = self._spec.rms_norm_eps
        if len(hidden) == 1 and isinstance(head, PlainLinear):
            output = hidden.new_empty(1, len(head.weight))
            return matvec(hidden, head.weight, output, norm=final, eps=eps, early=self._early)
        return head(norm(hidden, final, eps))

    def _layout(self, size: int) -> Layout:
        windows = tuple(dict.fromkeys(self._windows))
        return Layout(size, self._attention.max_items(size), 0, windows)

    def _layers(self, hidden: Tensor | None, batch: DeviceBatch) -> Tensor:
        assert self._frequencies is not None
        if hidden is None:
            assert self._weights.embedding is not None
            hidden = torch.nn.functional.embedding(batch.token_ids, self._weights.embedding)
            hidden = hidden.to(self._dtype)
        rope = self._spec.rope
        cos, sin = angles(batch.positions, self._frequencies, rope.attention_factor)
        step = _Pass(batch, cos, sin, self._attention.scratch(batch))
        if len(hidden) == 1 and all(map(_is_plain, self._weights.layers)):
            for i, layer in enumerate(self._weights.layers):
                self._lone_layer(hidden, i, layer, step)
            return hidden
        delta: Tensor | None = None
        for i, layer in enumerate(self._weights.layers):
            delta = self._layer(hidden, delta, i, layer, step)
        return hidden if delta is None else hidden.add_(delta)

    def _layer(
        self, hidden: Tensor, delta: Tensor | None, i: int, layer: LayerWeights, step: _Pass
    ) -> Tensor:
        """hidden: [T, E], to which `delta` is still to be added; what is to be added after it."""
        eps = self._spec.rms_norm_eps
        assert layer.input_norm is not None
        assert layer.mlp_norm is not None
        if delta is None:
            normed = norm(hidden, layer.input_norm, eps)
        else:
            normed = add_norm(hidden, delta, layer.input_norm, eps)
        delta = layer.output(self._attend(layer.qkv(normed), i, layer, step))
        normed = add_norm(hidden, delta, layer.mlp_norm, eps)
        mlp = _dense(layer)
        return mlp.down(gate(mlp.gate_up(normed)))

    def _lone_layer(self, hidden: Tensor, i: int, layer: LayerWeights, step: _Pass) -> None:
        """hidden: [1, E], in place."""
        eps, early = self._spec.rms_norm_eps, self._early
        qkv, output, gate_up, down = (
            _plain(x) for x in (layer.qkv, layer.output, _dense(layer).gate_up, _dense(layer).down)
        )
        heads = hidden.new_empty(1, len(qkv.weight))
        matvec(
            hidden, qkv.weight, heads, norm=layer.input_norm, addend=qkv.bias, eps=eps, early=early
        )
        attended = self._attend(heads, i, layer, step)
        matvec(attended, output.weight, hidden, addend=hidden, early=early)
        gated = hidden.new_empty(1, len(gate_up.weight) // 2)
        matvec(
            hidden,
            gate_up.weight,
            gated,
            norm=layer.mlp_norm,
            gated=True,
            eps=eps,
            early=early,
        )
        matvec(gated, down.weight, hidden, addend=hidden, early=early)

    def _attend(self, heads: Tensor, i: int, layer: LayerWeights, step: _Pass) -> Tensor:
        """heads: [T, (H + 2 * K) * D], before norm and rotation -> [T, H * D]."""
        norms = None
        if layer.query_norm is not None and layer.key_norm is not None:
            norms = layer.query_norm, layer.key_norm
        queries = rotate_and_write(
            heads.view(len(heads), -1, self._spec.head_dim),
            step.cos,
            step.sin,
            step.batch.slots,
            self._cache.keys[i],
            self._cache.values[i],
            norms,
            self._spec.rms_norm_eps,
        )
        window = self._windows[i]
        return self._attention.attend(queries, step.batch, window, self._cache, i, step.scratch)


class _Pass:
    """What all layers of a pass share. cos, sin: [T, 1, D / 2] float32."""

    def __init__(self, batch: DeviceBatch, cos: Tensor, sin: Tensor, scratch: Scratch) -> None:
        self.batch = batch
        self.cos = cos
        self.sin = sin
        self.scratch = scratch


def _dense(layer: LayerWeights) -> DenseMlp:
    """`load_stage` has refused mixtures of experts on this device."""
    assert isinstance(layer.mlp, DenseMlp)
    return layer.mlp


def _plain(linear: Linear) -> PlainLinear:
    assert isinstance(linear, PlainLinear)
    return linear


def _is_plain(layer: LayerWeights) -> bool:
    """Whether the kernel for a lone token has all that the layer's products have."""
    unbiased = (layer.output, _dense(layer).gate_up, _dense(layer).down)
    return isinstance(layer.qkv, PlainLinear) and all(
        isinstance(x, PlainLinear) and x.bias is None for x in unbiased
    )
