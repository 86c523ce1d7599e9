"""Whether workers have one and the same model, and what it is called by its content.

The first worker to register says what the model of the mesh is; whoever differs is refused. Once
the mesh has served, its model stays until the scheduler ends, since gateways hold its tokenizer and
requests its tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from scheduler.messages import Registration
from stagemesh.errors import ModelMismatch
from stagemesh.plan import ModelSummary

_NUM_PARTS_NAMED = 3
# Fields of a registration that its numbers depend on, and the options that they come from.
_NUMERICS = {
    "dtype": "--dtype",
    "wire_dtype": "--wire-dtype",
    "kv_dtype": "--kv-dtype",
    "batch_invariant": "--batch-invariant",
    "quantization": "--quantization",
}


class MeshModel:
    """The model that all workers agree on; None until one has registered."""

    def __init__(self) -> None:
        self._first: Registration | None = None
        self._part_hashes: dict[str, str] = {}
        self._identity: str | None = None

    @property
    def summary(self) -> ModelSummary | None:
        return None if self._first is None else self._first.model

    @property
    def adapters(self) -> Mapping[str, str]:
        """Identities of the adapters that all workers hold, by name."""
        return {} if self._first is None else self._first.adapters

    @property
    def identity(self) -> str:
        """Hash over the structure and all parts that are known; fixed by `pin`."""
        if self._identity is not None:
            return self._identity
        structure = self._first.model.structure_hash if self._first else ""
        content = json.dumps([structure, sorted(self._part_hashes.items())])
        return hashlib.sha256(content.encode()).hexdigest()

    def admit(self, worker: Registration) -> None:
        """Raises ModelMismatch that says what differs."""
        if self._first is not None:
            _check_same_structure(self._first, worker)
            self._check_same_parts(worker)
            _check_same_numerics(self._first, worker)
            _check_same_adapters(self._first, worker)
        self._first = self._first or worker
        self._part_hashes |= worker.model.part_hashes

    def pin(self) -> None:
        """The mesh has served: its model stays."""
        self._identity = self.identity

    def all_workers_left(self) -> None:
        if self._identity is None:
            self._first = None
            self._part_hashes = {}

    def _check_same_parts(self, worker: Registration) -> None:
        theirs = worker.model.part_hashes
        different = [
            part for part, ours in self._part_hashes.items() if theirs.get(part, ours) != ours
        ]
        if not different:
            return
        named = ", ".join(different[:_NUM_PARTS_NAMED])
        more = f" and {len(different) - _NUM_PARTS_NAMED} more" * (
            len(different) > _NUM_PARTS_NAMED
        )
        raise ModelMismatch(
            f"worker {worker.worker_id} has other weights than the mesh in {named}{more}, in a "
            f"model of the same structure ({worker.model.name})"
        )


def _check_same_structure(first: Registration, worker: Registration) -> None:
    ours, theirs = first.model, worker.model
    if ours.structure_hash == theirs.structure_hash:
        return
    differing = [
        f"{name} is {getattr(theirs, name)}, not {getattr(ours, name)}"
        for name in ("architecture", "num_layers", "hidden_size", "vocab_size", "max_position")
        if getattr(theirs, name) != getattr(ours, name)
    ]
    what = "; ".join(differing) or "its config or its tensors' types and shapes differ"
    raise ModelMismatch(
        f"worker {worker.worker_id} has the model {theirs.name}, the mesh has {ours.name}: {what}"
    )


def _check_same_numerics(first: Registration, worker: Registration) -> None:
    """A pipeline's numbers must not depend on which worker holds a stage."""
    for name, option in _NUMERICS.items():
        ours, theirs = getattr(first, name), getattr(worker, name)
        if ours != theirs:
            raise ModelMismatch(
                f"worker {worker.worker_id} computes with {option} {theirs}, the mesh with {ours}"
            )


def _check_same_adapters(first: Registration, worker: Registration) -> None:
    """Requests choose an adapter of the mesh, whichever workers they come to."""
    for name in sorted(first.adapters.keys() | worker.adapters.keys()):
        ours, theirs = first.adapters.get(name), worker.adapters.get(name)
        if ours == theirs:
            continue
        if theirs is None:
            what = f"lacks the adapter {name}, which the mesh has"
        elif ours is None:
            what = f"has the adapter {name}, which the mesh has not"
        else:
            what = f"has other numbers in the adapter {name} than the mesh"
        raise ModelMismatch(f"worker {worker.worker_id} {what}: --adapter must be the same")
