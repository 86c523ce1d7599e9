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
from support.thorough import thorough

from stage_worker.layout import all_parts, part_tensors
from stage_worker.linear import PIECE_WEIGHTS
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
# What is quantised is a piece at a time; few pieces are much against few layers.
MAX_PIECES_BYTES = 6 * 4 * PIECE_WEIGHTS
Case = tuple[int, int, str, bool, str]
CASES: list[Case] = [
    (0, 8, "float32", False, "auto"),
    (0, 2, "float32", False, "auto"),
    (3, 5, "float32", False, "auto"),
    (6, 8, "float32", False, "auto"),
    (4, 5, "float32", False, "auto"),
    (0, 8, "float32", True, "auto"),
    (0, 2, "float32", True, "auto"),
    (3, 5, "float32", True, "auto"),
    (6, 8, "float32", True, "auto"),
    (0, 2, "bfloat16", False, "auto"),
    (6, 8, "bfloat16", False, "auto"),
    (0, 8, "float32", False, "int8"),
    (3, 5, "float32", False, "int8"),
    (0, 8, "float32", False, "int4-g64"),
    (6, 8, "bfloat16", False, "int4-g64,head=none"),
]


def make_checkpoint(path: Path, *, tied: bool, dtype: torch.dtype = torch.float32) -> int:
    """Writes a file per part; returns the bytes of all tensors."""
    path.mkdir()
    config = {**CONFIG, "tie_word_embeddings": tied, "torch_dtype": str(dtype)}
    (path / "config.json").write_text(json.dumps(config))
    spec = ModelSpec.from_directory(path)
    weight_map, total = {}, 0
    for part in all_parts(spec):
        shapes = part_tensors(spec, part)
        if tied and part == "head":
            continue
        tensors = {name: (torch.rand(shape) * 0.02).to(dtype) for name, shape in shapes.items()}
        save_file(tensors, path / f"{part}.safetensors")
        weight_map.update(dict.fromkeys(tensors, f"{part}.safetensors"))
        total += sum(tensor.nbytes for tensor in tensors.values())
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def measured(path: Path, cases: list[Case], ranks: list[tuple[int, int]]) -> list[dict[str, int]]:
    program = REPO / "tests" / "support" / "measure_stage_memory.py"
    finished = subprocess.run(
        [
            *(sys.executable, str(program), str(path)),
            json.dumps([[*case, *rank] for case, rank in zip(cases, ranks, strict=True)]),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]


def check_shares(path: Path, cases: list[Case]) -> None:
    for case, told in zip(cases, measured(path, cases, [(0, 1)] * len(cases)), strict=True):
        share = (told["peak"] - told["idle"]) / told["weights"]
        print(f"{case}: peak {share:.3f} of {told['weights'] / 2**20:.0f} MiB")
        beside = MAX_PIECES_BYTES / told["weights"] if "int" in case[-1] else 0
        assert share <= MAX_SHARE + beside, f"{case}: {told}"
        assert told["loaded"] - told["idle"] >= 0.5 * told["weights"]  # it did load them


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "untied"
    assert make_checkpoint(path, tied=False) >= 400e6
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_anonymous_memory_of_stages(untied: Path) -> None:
    check_shares(untied, CASES)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_reads_and_holds_its_share(untied: Path) -> None:
    cases: list[Case] = [(0, 8, "float32", False, "auto"), (6, 8, "float32", False, "auto")]
    for case in cases:
        ranks = [(0, 1), (0, 2), (1, 2), (3, 4)]
        whole, *parts = measured(untied, [case] * len(ranks), ranks)
        for (rank, size), told in zip(ranks[1:], parts, strict=True):
            share = whole["weights"] / size
            peak = (told["peak"] - told["idle"]) / share
            print(
                f"{case}, rank {rank} of {size}: peak {peak:.3f}, read {told['read'] / share:.3f}"
            )
            assert peak <= MAX_SHARE
            assert told["read"] <= MAX_SHARE * share
            assert told["read"] >= 0.9 * share  # it was counted


@thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_anonymous_memory_with_tied_embeddings(tmp_path: Path) -> None:
    assert make_checkpoint(tmp_path / "tied", tied=True) >= 400e6
    check_shares(
        tmp_path / "tied", [(0, 8, "float32", False, "auto"), (7, 8, "float32", True, "auto")]
    )
    check_shares(
        tmp_path / "tied", [(0, 8, "float32", True, "auto"), (0, 1, "float32", False, "auto")]
    )
    check_shares(tmp_path / "tied", [(0, 8, "float32", False, "int8")])


@thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_anonymous_memory_of_16_bits_a_weight(tmp_path: Path) -> None:
    """Files of 16 bits stay 16 bits where the arithmetic is float32."""
    num_bytes = make_checkpoint(tmp_path / "half", tied=False, dtype=torch.bfloat16)
    assert num_bytes <= 250e6
    check_shares(tmp_path / "half", [(0, 8, "float32", False, "auto")])
