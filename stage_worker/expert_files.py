"""Experts of a mixture, read from the model's files once the rest of a stage is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stage_worker.experts import DenseMlp
from stage_worker.identity import FileStamps, file_stamps
from stage_worker.linear_schemes import Numerics
from stage_worker.weights import WeightLoader
from stagemesh.errors import CheckpointError
from stagemesh.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ExpertFiles:
    """Whole experts, as the stage's own were made; `stamps` are of the files that those came from.
    Keeps nothing of a stage alive, however long it reads."""

    model_dir: Path
    spec: ModelSpec
    numerics: Numerics
    stamps: FileStamps

    def read(self, layer: int, experts: Iterable[int]) -> Iterator[tuple[int, DenseMlp]]:
        """Each with its number. Raises CheckpointError, at the end too: where files have changed,
        what was read before is not this model's."""
        loader = WeightLoader(self.model_dir, self.spec, self.numerics)
        try:
            for expert in experts:
                yield expert, loader.expert(layer, expert)
        finally:
            loader.close()
        if file_stamps(self.model_dir) != self.stamps:
            raise CheckpointError(
                f"files of {self.model_dir} have changed since layers were loaded from them"
            )
