"""Stages rebuilt over contexts of many steps: from the log, without it, and where it is too small.

On a generated model whose context is longer than the demo model's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.chaos import NUM_LASTING, WAITING, Meshes, loaded, watched
from support.thorough import thorough

from benchmarks.recovery.load import Truth, asks
from benchmarks.recovery.parts_mesh import MeshShape
from benchmarks.recovery.random_model import ModelShape, make

pytestmark = pytest.mark.timeout(180)

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    max_tokens=4096,
)
BLOCK_TOKENS = 16
NUM_BLOCKS = 600
# Streams that are longer than a step, which has 512 tokens at most.
WANTED = tuple(asks(2, 9, prompt_tokens=(800, 600), max_tokens=32))
LOGS: dict[str, tuple[str, ...]] = {
    "logged": (),
    "not logged": ("--max-log-memory", "0"),
    # Half of the blocks in use.
    "partly logged": (
        "--max-log-memory",
        str(40 * BLOCK_TOKENS * SHAPE.log_bytes_per_token),
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "random-llama"
    make(made, SHAPE)
    return made


@pytest.fixture(scope="module")
def long_truth() -> Truth:
    return Truth()


@pytest.mark.parametrize(
    ("stage", "log"),
    [
        (1, "logged"),
        pytest.param(0, "logged", marks=thorough),
        pytest.param(1, "not logged", marks=thorough),
        (1, "partly logged"),
    ],
)
async def test_a_lost_stage_is_rebuilt(
    meshes: Meshes, model: Path, long_truth: Truth, stage: int, log: str
) -> None:
    """The last stage, whose input the one before may have logged; or the first, whose input are
    the tokens."""
    shape = MeshShape(
        model=model,
        stages=2,
        spares=1,
        scheduler_options=WAITING,
        worker_options=("--num-blocks", str(NUM_BLOCKS), *LOGS[log]),
    )
    async with watched(meshes.get(shape)) as mesh, loaded(mesh, long_truth, WANTED) as load:
        mesh.at(await mesh.status(), stage).kill()
        await mesh.until(lambda s: s.pipelines[0].mending.num_tokens_rebuilt >= 600, "a rebuild")
        await load.until_more_tokens(NUM_LASTING)
