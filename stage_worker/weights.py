"""Loads the weights of one span, tensor by tensor, into what the decoder computes with.

Source tensors are views of the mapped files; only what is kept takes anonymous memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stage_worker.checkpoint import Checkpoint
from stage_worker.layout import EMBEDDING, NORM, head_name, part_tensors, span_parts
from stage_worker.linear import Linear, PlainLinear, packed_linear, plain_linear
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import Span


@dataclass(frozen=True, slots=True)
class LayerWeights:
    input_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Linear
    post_attention_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class StageWeights:
    """`embedding` [V, hidden] is there on the first stage, `norm` and `head` on the last."""

    embedding: Tensor | None
    layers: tuple[LayerWeights, ...]
    norm: Tensor | None
    head: Linear | None


def span_bytes(spec: ModelSpec, span: Span, item_bytes: int) -> int:
    """Bytes of the span's tensors with items of that size; a shared tensor counts once."""
    shapes = {}
    for part in span_parts(spec, span):
        shapes.update(part_tensors(spec, part))
    return item_bytes * sum(torch.Size(shape).numel() for shape in shapes.values())


class WeightLoader:
    """Loads from one directory with one dtype, device and kind of linear layer."""

    def __init__(
        self,
        model_dir: Path,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device,
        packed: bool,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._files = Checkpoint(model_dir)
        self._spec = spec
        self._dtype = dtype
        self._device = device
        self._packed = packed
        self._on_bytes = on_bytes
        self._shapes: dict[str, tuple[int, ...]] = {}

    def load(self, span: Span) -> StageWeights:
        """Raises CheckpointError, UnsupportedModel, SpanError."""
        for part in span_parts(self._spec, span):
            self._shapes.update(part_tensors(self._spec, part))
        for name in self._shapes:  # what is wrong is found before anything large is read
            self._view(name)
        layers = tuple(self._layer(i) for i in range(span.start, span.end))
        embedding, head = self._ends(span)
        norm = self._vector(NORM) if head is not None else None
        self._files.close()
        return StageWeights(embedding, layers, norm, head)

    def _ends(self, span: Span) -> tuple[Tensor | None, Linear | None]:
        first, last = span.start == 0, span.end == self._spec.num_layers
        if first and last and self._spec.tie_embeddings:
            head = self._linear([head_name(self._spec)])
            # A packed matrix cannot be looked up in: rows are then read from the mapped file.
            shared = head.weight if isinstance(head, PlainLinear) else self._view(EMBEDDING)
            return shared, head
        embedding = self._plain(EMBEDDING).weight if first else None
        return embedding, self._linear([head_name(self._spec)]) if last else None

    def _layer(self, layer: int) -> LayerWeights:
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qk_norm = self._spec.qk_norm
        return LayerWeights(
            input_norm=self._vector(prefix + "input_layernorm.weight"),
            qkv=self._linear([f"{attention}{x}_proj.weight" for x in "qkv"]),
            query_norm=self._vector(attention + "q_norm.weight") if qk_norm else None,
            key_norm=self._vector(attention + "k_norm.weight") if qk_norm else None,
            output=self._linear([attention + "o_proj.weight"]),
            post_attention_norm=self._vector(prefix + "post_attention_layernorm.weight"),
            gate_up=self._linear([mlp + "gate_proj.weight", mlp + "up_proj.weight"]),
            down=self._linear([mlp + "down_proj.weight"]),
        )

    def _linear(self, names: Sequence[str]) -> Linear:
        if not self._packed:
            return self._plain(*names)
        return packed_linear(self._views(names), self._biases(names), self._on_bytes)

    def _plain(self, *names: str) -> PlainLinear:
        return plain_linear(
            self._views(names), self._biases(names), self._dtype, self._device, self._on_bytes
        )

    def _vector(self, name: str) -> Tensor:
        vector = self._view(name).to(self._device, self._dtype, copy=True)
        self._on_bytes(vector.nbytes)
        return vector

    def _biases(self, weight_names: Sequence[str]) -> list[Tensor]:
        names = [name.removesuffix("weight") + "bias" for name in weight_names]
        return self._views([name for name in names if name in self._shapes])

    def _views(self, names: Sequence[str]) -> list[Tensor]:
        return [self._view(name) for name in names]

    def _view(self, name: str) -> Tensor:
        return self._files.view(name, self._shapes[name])
