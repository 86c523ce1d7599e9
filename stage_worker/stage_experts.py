"""The mixtures of experts of a stage: what their routers did, and which experts a rank has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from stage_worker.expert_fetch import ExpertFetch, Tell
from stage_worker.expert_files import ExpertFiles
from stage_worker.expert_placement import Placement
from stage_worker.experts import SparseMlp
from stage_worker.memory import trim_host
from stage_worker.weights import StageWeights
from stagemesh.errors import ProtocolError, StageMeshError
from stagemesh.plan import Span


@dataclass(frozen=True, slots=True)
class _Fetch:
    """Under way, or done, of a placement to come."""

    layer: int
    placement: Placement
    fetch: ExpertFetch


class StageExperts:
    """Used on the device thread, but for `routing`."""

    def __init__(self, weights: StageWeights, span: Span, rank: int, files: ExpertFiles) -> None:
        self._layers = {
            span.start + i: layer.mlp
            for i, layer in enumerate(weights.layers)
            if isinstance(layer.mlp, SparseMlp)
        }
        self._rank = rank
        self._files = files
        self._fetch: _Fetch | None = None

    def routing(self) -> dict[int, list[int]]:
        """Of each layer that has experts: how many tokens each was given. Any thread may ask."""
        return {layer: mlp.tokens_routed.tolist() for layer, mlp in self._layers.items()}

    @torch.inference_mode()
    def forget_routing(self) -> None:
        """After steps that nobody asked for."""
        for mlp in self._layers.values():
            mlp.tokens_routed.zero_()

    def fetch(self, layer: int, placement: Placement, tell: Tell) -> None:
        """Begins to read what this rank lacks of its experts of this placement, instead of what was
        fetched before; another thread tells when that is over."""
        lacking = self._layers[layer].lacking(placement, self._rank)
        read = partial(self._files.read, layer, lacking)
        self._fetch = _Fetch(layer, placement, ExpertFetch(read, tell))

    def place(self, layer: int, placement: Placement) -> None:
        """Has this rank hold its experts of this placement, which have been fetched: reads nothing.
        Raises ProtocolError where they have not."""
        held, mlp = self._fetch, self._layers[layer]
        if held is None or (held.layer, held.placement) != (layer, placement):
            raise ProtocolError(f"experts of layer {layer} are placed that nobody has fetched")
        lacking = set(mlp.lacking(placement, self._rank)) - held.fetch.experts.keys()
        if lacking:
            raise ProtocolError(f"experts {sorted(lacking)} of layer {layer} have not been fetched")
        mlp.hold(placement, self._rank, held.fetch.experts.__getitem__)
        self._fetch = None
        # Nothing of an expert hangs in cycles: to look for those takes longer than many steps.
        trim_host()

    def drop(self) -> StageMeshError | None:
        """Forgets what was fetched, whether or not it is there; returns what it failed of."""
        error = self._fetch.fetch.error if self._fetch is not None else None
        self._fetch = None
        trim_host()
        return error
