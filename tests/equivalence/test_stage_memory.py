"""A stage holds its share of a checkpoint: its tensors and at most 15 % more.

Anonymous memory above an idle worker, KV excluded, at its peak while loading and in a step,
whatever the tensors are turned into.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.paths import REPO

from stage_worker.layout import all_parts, part_tensors
from stagemesh.model_spec import ModelSpec

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 16000,
    "max_position_embeddings": 128,
    "torch_dtype": "float32",
}
MAX_SHARE = 1.15
CASES: list[tuple[int, int, str, bool]] = [
    (0, 8, "float32", False),
    (0, 2, "float32", False),
    (3, 5, "float32", False),
    (6, 8, "float32", False),
    (4, 5, "float32", False),
    (0, 8, "float32", True),
    (0, 2, "float32", True),
    (3, 5, "float32", True),
    (6, 8, "float32", True),
    (0, 2, "bfloat16", False),
    (6, 8, "bfloat16", False),
]


def make_checkpoint(path: Path, *, tied: bool) -> int:
    """Writes a file per part; returns the bytes of all tensors."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": tied}))
    spec = ModelSpec.from_directory(path)
    weight_map, total = {}, 0
    for part in all_parts(spec):
        shapes = part_tensors(spec, part)
        if tied and part == "head":
            continue
        tensors = {name: torch.rand(shape) * 0.02 for name, shape in shapes.items()}
        save_file(tensors, path / f"{part}.safetensors")
        weight_map.update(dict.fromkeys(tensors, f"{part}.safetensors"))
        total += sum(tensor.nbytes for tensor in tensors.values())
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def check_shares(path: Path, cases: list[tuple[int, int, str, bool]]) -> None:
    program = REPO / "tests" / "support" / "measure_stage_memory.py"
    finished = subprocess.run(
        [sys.executable, str(program), str(path), json.dumps(cases)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
    )
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    for case, line in zip(cases, lines, strict=True):
        told = json.loads(line)
        share = (told["peak"] - told["idle"]) / told["weights"]
        print(f"{case}: peak {share:.3f} of {told['weights'] / 2**20:.0f} MiB")
        assert share <= MAX_SHARE, f"{case}: {told}"
        assert told["loaded"] - told["idle"] >= 0.5 * told["weights"]  # it did load them


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_anonymous_memory_of_stages(tmp_path: Path) -> None:
    assert make_checkpoint(tmp_path / "untied", tied=False) >= 400e6
    check_shares(tmp_path / "untied", CASES)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_anonymous_memory_with_tied_embeddings(tmp_path: Path) -> None:
    assert make_checkpoint(tmp_path / "tied", tied=True) >= 400e6
    check_shares(tmp_path / "tied", [(0, 8, "float32", False), (7, 8, "float32", True)])
    check_shares(tmp_path / "tied", [(0, 8, "float32", True), (0, 1, "float32", False)])
