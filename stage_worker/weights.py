"""Loads the weights of one span, tensor by tensor, into what the decoder computes with.

Source tensors are views of the mapped files; only what is kept takes anonymous memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from stage_worker import weight_names as roles
from stage_worker.checkpoint import Checkpoint
from stage_worker.expert_stacks import stack_of
from stage_worker.experts import DenseMlp, Router, SharedExpert, SparseMlp
from stage_worker.layout import (
    EMBEDDING,
    NORM,
    all_parts,
    bias_name,
    head_name,
    is_quantisable,
    part_weights,
    span_parts,
    stored_way,
)
from stage_worker.linear import Linear, LinearSource, PlainLinear
from stage_worker.linear_schemes import Numerics, choose_scheme, make_float
from stage_worker.sharding import Shards
from stage_worker.stacked_weights import Mxfp4Source, float_view
from stage_worker.stored_weights import open_codes
from stage_worker.weight_names import is_sparse, moe_names, names_of, tensor_name
from stage_worker.weight_source import FloatSource, WeightSource, part_of
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import Span


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Norms are there as far as the model has them: of what attention and the feed-forward part
    take (`input_norm`, `mlp_norm`), of what they give (`attended_norm`, `mlp_output_norm`), of
    queries and keys. `sinks` [heads] are float32.
    """

    input_norm: Tensor | None
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    sinks: Tensor | None
    output: Linear
    attended_norm: Tensor | None
    mlp_norm: Tensor | None
    mlp: DenseMlp | SparseMlp
    mlp_output_norm: Tensor | None


@dataclass(frozen=True, slots=True)
class StageWeights:
    """`embedding` [V, hidden] is there on the first stage, `norm` and `head` on the last."""

    embedding: Tensor | None
    layers: tuple[LayerWeights, ...]
    norm: Tensor | None
    head: Linear | None


class WeightLoader:
    """Loads from one directory with one choice of numerics; with `shards` only what they have."""

    def __init__(
        self,
        model_dir: Path,
        spec: ModelSpec,
        numerics: Numerics,
        on_bytes: Callable[[int], None] = lambda num_bytes: None,
        shards: Shards | None = None,
    ) -> None:
        self._files = Checkpoint(model_dir)
        self._spec = spec
        self._numerics = numerics
        self._on_bytes = on_bytes
        self._shards = shards or Shards(spec)
        self._shapes = {
            name: shape
            for part in all_parts(spec)
            for name, shape in part_weights(spec, part).items()
        }

    def part_bytes(self, part: str) -> int:
        """What the part will take; a little more or less where that depends on its numbers.

        Finds what is wrong with its tensors, before anything large is read. Raises CheckpointError,
        UnsupportedModel, ConfigError.
        """
        shapes = part_weights(self._spec, part)
        linears = [name for name in shapes if is_quantisable(name) or name == head_name(self._spec)]
        floats = [name for name in shapes if name not in linears and self._has(name)]
        num_bytes = sum(map(self._float_bytes, floats))
        if part == "embedding":
            return self._embedding_bytes()
        for name in linears:
            for source in self._sources(name):
                scheme = choose_scheme(part, [source], self._numerics)
                num_bytes += scheme.held_bytes(*source.shape, self._numerics)
        return num_bytes

    def span_bytes(self, span: Span) -> int:
        """Of all parts of the span, as `part_bytes`; a shared tensor counts once. And SpanError."""
        parts = span_parts(self._spec, span)
        if "head" in parts and "embedding" in parts and self._spec.tie_embeddings:
            parts.remove("embedding")
        return sum(map(self.part_bytes, parts))

    def load(self, span: Span) -> StageWeights:
        """Raises what `span_bytes` does."""
        layers = tuple(self._layer(i) for i in range(span.start, span.end))
        embedding, head = self._ends(span)
        norm = self._norm(NORM) if head is not None else None
        self._files.close()
        return StageWeights(embedding, layers, norm, head)

    def _ends(self, span: Span) -> tuple[Tensor | None, Linear | None]:
        first, last = span.start == 0, span.end == self._spec.num_layers
        if first and last and self._spec.tie_embeddings:
            head = self._linear("head", head_name(self._spec))
            # Other matrices cannot be looked up in: rows are then read from the mapped file.
            shared = head.weight if isinstance(head, PlainLinear) else self._view(EMBEDDING)
            return shared, head
        embedding = self._embedding() if first else None
        return embedding, self._linear("head", head_name(self._spec)) if last else None

    def _layer(self, layer: int) -> LayerWeights:
        def linear(*held: str) -> Linear:
            return self._linear(f"layer.{layer}", *names_of(self._spec, layer, *held))

        def norm(role: str) -> Tensor | None:
            found = names_of(self._spec, layer, role)
            return self._norm(found[0]) if found else None

        sinks = names_of(self._spec, layer, roles.SINKS)

        return LayerWeights(
            input_norm=norm(roles.INPUT_NORM),
            qkv=linear(roles.QUERY, roles.KEY, roles.VALUE),
            query_norm=norm(roles.QUERY_NORM),
            key_norm=norm(roles.KEY_NORM),
            sinks=self._vector(sinks[0], torch.float32) if sinks else None,
            output=linear(roles.OUTPUT),
            attended_norm=norm(roles.ATTENDED_NORM),
            mlp_norm=norm(roles.MLP_NORM),
            mlp=self._experts(layer)
            if is_sparse(self._spec, layer)
            else DenseMlp(linear(roles.GATE, roles.UP), linear(roles.DOWN)),
            mlp_output_norm=norm(roles.MLP_OUTPUT_NORM),
        )

    def _experts(self, layer: int) -> SparseMlp:
        moe, shards = self._spec.moe, self._shards
        assert moe is not None
        module, router_name, _ = moe_names(self._spec)
        shared = None
        if moe.shared_size:
            gate = self._plain(tensor_name(layer, f"{module}.shared_expert_gate"))
            shared = SharedExpert(self._mlp_of(layer, "shared_expert"), gate)
        scores = self._plain(tensor_name(layer, f"{module}.{router_name}"))
        router = Router(scores, moe.num_chosen, moe.renormalised)
        load = partial(self.expert, layer)
        return SparseMlp(router, shards.placement, shards.expert_rank, load, shared)

    def expert(self, layer: int, number: int) -> DenseMlp:
        """One of a layer's mixture; errors as `part_bytes`."""
        return self._mlp_of(layer, f"experts.{number}")

    def close(self) -> None:
        self._files.close()

    def _mlp_of(self, layer: int, name: str) -> DenseMlp:
        """Of a layer's mixture of experts: the one of that name."""
        module, _, names = moe_names(self._spec)
        gate, up, down = (tensor_name(layer, f"{module}.{name}.{each}") for each in names)
        part = f"layer.{layer}"
        return DenseMlp(self._linear(part, gate, up), self._linear(part, down))

    def _linear(self, part: str, *names: str) -> Linear:
        source = self._source(*names)
        return choose_scheme(part, source.weights, self._numerics).make(source, self._numerics)

    def _plain(self, name: str) -> Linear:
        """A matrix that is never quantised."""
        return make_float(self._source(name), self._numerics)

    def _source(self, *names: str) -> LinearSource:
        biases = map(bias_name, names)
        return LinearSource(
            [source for name in names for source in self._sources(name)],
            [self._view(name) for name in biases if name in self._shapes and self._has(name)],
            self._on_bytes,
        )

    def _embedding(self) -> Tensor:
        source = LinearSource(self._sources(EMBEDDING), [], self._on_bytes)
        return PlainLinear.make(source, self._embedding_dtype(), self._numerics.device).weight

    def _embedding_bytes(self) -> int:
        return self._embedding_dtype().itemsize * self._view(EMBEDDING).numel()

    def _float_bytes(self, name: str) -> int:
        """Of what is never quantised: biases, norms, and what chooses experts."""
        dtype = self._norm_dtype() if name.endswith("norm.weight") else self._numerics.dtype
        if name.endswith("sinks"):
            dtype = torch.float32
        return self._view(name).numel() * dtype.itemsize

    def _embedding_dtype(self) -> torch.dtype:
        """What is looked up is converted then: float32 would only take more memory."""
        dtype, stored = self._numerics.dtype, self._view(EMBEDDING).dtype
        return stored if stored.itemsize < dtype.itemsize else dtype

    def _norm(self, name: str) -> Tensor:
        """What is multiplied by, whatever of it files leave out."""
        return self._vector(name, self._norm_dtype()).add_(self._spec.norms.offset)

    def _vector(self, name: str, dtype: torch.dtype) -> Tensor:
        stored = self._view(name).to(self._numerics.device, dtype, copy=True)
        self._on_bytes(stored.nbytes)
        return stored

    def _norm_dtype(self) -> torch.dtype:
        return torch.float32 if self._spec.norms.wide else self._numerics.dtype

    def _sources(self, name: str) -> list[WeightSource]:
        """This rank's part of a matrix, or of each of those that the tensor holds."""
        shape, way = self._shapes[name], stored_way(self._spec, name)
        parts = self._shards.parts(name, shape)
        if way is None:
            view = float_view(self._files, self._spec, name, shape)
            return [FloatSource(view[part.rows, part.columns]) for part in parts]
        stack = stack_of(self._spec, name, shape)
        if stack is not None:
            stacked = Mxfp4Source.open(self._files, stack)
            return [stacked.part(part) for part in parts]
        codes = open_codes(self._files, name, shape, way)
        return [part_of(codes, part, name) for part in parts]

    def _has(self, name: str) -> bool:
        return self._shards.part(name, self._shapes[name]) is not None

    def _view(self, name: str) -> Tensor:
        """This rank's part of it."""
        shape = self._shapes[name]
        part = self._shards.part(name, shape)
        assert part is not None
        view = float_view(self._files, self._spec, name, shape)
        return view[part.rows] if len(shape) == 1 else view[part.rows, part.columns]
