"""Decode throughput of whole meshes, by stages and ranks, as `stagemesh bench` measures it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SHAPES = ((1, 1), (2, 1), (1, 2), (2, 2))
"""(stages, ranks of each); every rank computes with one thread."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens a second while all requests decode, or, where they never did, of the whole run."""

    stages: int
    ranks: int
    batch: int
    tokens_per_s: float

    @property
    def per_worker(self) -> float:
        """Of each process that computes."""
        return self.tokens_per_s / (self.stages * self.ranks)


def measure(
    model_dir: Path,
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    up: str,
    scratch: Path,
) -> Iterator[Throughput]:
    for stages, ranks in shapes:
        out = scratch / f"pp{stages}tp{ranks}"
        subprocess.run(
            [
                *(sys.executable, "-m", "stagemesh.cli.main", "bench", "--model", str(model_dir)),
                *("--stages", str(stages), "--threads", "1"),
                *("--batch", ",".join(map(str, batches))),
                *("--prompt-tokens", "16", "--output-tokens", "32", "--no-plots"),
                *("--up", f"--tensor-parallel {ranks} {up}", "--out", str(out)),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        for report in json.loads((out / "results.json").read_text())["reports"]:
            level = report["setting"]["load"]["level"]
            # Where there was no time in which all were decoding: of the whole run.
            rate = report["decode_tokens_per_s"] or report["output_tokens_per_s"]
            yield Throughput(stages, ranks, int(level), rate)
