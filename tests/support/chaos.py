"""What chaos tests share: a mesh that outlives them, and load whose answers are known."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from support.paths import DEMO_MODEL
from support.template import fork_worker

from benchmarks.recovery.load import Ask, Load, Stream, Truth, asks
from benchmarks.recovery.part import Part
from benchmarks.recovery.parts_mesh import MeshShape, PartsMesh, Status

SEED = 20261121
NUM_LASTING = 4
# Prompts of up to ten blocks; the demo model's context is 512 tokens.
MANY = tuple(asks(16, SEED, max_tokens=40))
LONG = tuple(asks(4, SEED + 1, prompt_tokens=(12, 40, 90), max_tokens=120))
LONG_PROMPTS = tuple(asks(16, SEED + 2, prompt_tokens=(180, 220, 200), max_tokens=16))

# On a busy machine a process may take longer to come back than layers wait by default.
WAITING = ("--takeover-after", "1h")
THREE_AND_A_SPARE = MeshShape(model=DEMO_MODEL, stages=3, spares=1, scheduler_options=WAITING)


class Meshes:
    """The meshes of a test session. Tests that want the same shape one after another share one."""

    def __init__(self) -> None:
        self._mesh: PartsMesh | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="stagemesh-chaos-")

    def get(self, shape: MeshShape) -> PartsMesh:
        if self._mesh is None or self._mesh.shape != shape:
            self._drop()
            self._mesh = PartsMesh(
                shape, Path(tempfile.mkdtemp(dir=self._scratch.name)), fork_worker
            )
        return self._mesh

    def _drop(self) -> None:
        if self._mesh is not None:
            self._mesh.end()
            self._mesh = None

    def end(self) -> None:
        self._drop()
        self._scratch.cleanup()


@asynccontextmanager
async def watched(mesh: PartsMesh) -> AsyncIterator[PartsMesh]:
    """A whole mesh, that can be made whole again afterwards. One that cannot is ended."""
    try:
        await mesh.restore()
        yield mesh
        await mesh.restore()
    except BaseException:
        print(mesh.describe())
        mesh.end()
        raise


@asynccontextmanager
async def loaded(
    mesh: PartsMesh, truth: Truth, wanted: Sequence[Ask] = MANY, *, each: int = 4
) -> AsyncIterator[Load]:
    """Load for the time of the block, which begins when each stream is `each` tokens far. A few of
    them are begun again and again, so that it does not run dry.

    All that were begun are right in the end: every token, in order, once.
    """
    await truth.learn(mesh.target, wanted)
    async with Load(mesh.target, wanted, repeat=NUM_LASTING) as load:
        await load.until_tokens(each)
        yield load
        await load.finish()
    check(truth, load.done)


def check(truth: Truth, streams: Sequence[Stream]) -> None:
    gaps = sorted(stream.longest_gap_s() for stream in streams)
    print(f"longest pauses of {len(gaps)} streams: {gaps[0]:.2f} to {gaps[-1]:.2f} s")
    assert truth.faults(streams) == []


def is_member(status: Status, part: Part) -> bool:
    """Whether the process is a member now; one that came back under the same name is another."""
    return any(worker.pid == part.pid for worker in status.workers)


async def lasting(duration_s: float) -> None:
    """How long a fault is to last, where that is what the test is about. Never to wait for the
    mesh."""
    await asyncio.sleep(duration_s)
