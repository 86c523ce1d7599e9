"""The mixtures of experts of a stage: what their routers did, and which experts a rank has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from stage_worker.expert_placement import Placement
from stage_worker.experts import SparseMlp
from stage_worker.memory import trim
from stage_worker.weights import StageWeights, WeightLoader
from stagemesh.plan import Span


class StageExperts:
    """`make_loader` makes one that reads whole experts."""

    def __init__(
        self,
        weights: StageWeights,
        span: Span,
        rank: int,
        make_loader: Callable[[], WeightLoader],
    ) -> None:
        self._layers = {
            span.start + i: layer.mlp
            for i, layer in enumerate(weights.layers)
            if isinstance(layer.mlp, SparseMlp)
        }
        self._rank = rank
        self._make_loader = make_loader

    def routing(self) -> dict[int, list[int]]:
        """Of each layer that has experts: how many tokens each was given. Any thread may ask."""
        return {layer: mlp.tokens_routed.tolist() for layer, mlp in self._layers.items()}

    @torch.inference_mode()
    def forget_routing(self) -> None:
        """After steps that nobody asked for."""
        for mlp in self._layers.values():
            mlp.tokens_routed.zero_()

    @torch.inference_mode()
    def place(self, layer: int, placement: Placement) -> None:
        """Has this rank hold its experts of this placement; reads those that it lacks.

        Raises CheckpointError where the files are gone.
        """
        loader = self._make_loader()
        try:
            self._layers[layer].hold(placement, self._rank, partial(loader.expert, layer))
        finally:
            loader.close()
        trim()
