"""What chaos tests share: a mesh that outlives them, and load whose answers are known."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from support.paths import DEMO_MODEL

from benchmarks.recovery.load import Ask, Load, Stream, Truth, asks
from benchmarks.recovery.parts_mesh import MeshShape, PartsMesh

SEED = 20261121
# Prompts of up to ten blocks; the demo model's context is 512 tokens.
MANY = tuple(asks(32, SEED, max_tokens=48))
LONG = tuple(asks(6, SEED + 1, prompt_tokens=(12, 40, 90), max_tokens=200))
LONG_PROMPTS = tuple(asks(16, SEED + 2, prompt_tokens=(180, 220, 200), max_tokens=16))

THREE_AND_A_SPARE = MeshShape(model=DEMO_MODEL, stages=3, spares=1)


class Meshes:
    """The meshes of a test session. Tests that want the same shape one after another share one."""

    def __init__(self) -> None:
        self._mesh: PartsMesh | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="stagemesh-chaos-")

    async def get(self, shape: MeshShape) -> PartsMesh:
        if self._mesh is None or self._mesh.shape != shape:
            self.drop()
            self._mesh = PartsMesh(shape, Path(tempfile.mkdtemp(dir=self._scratch.name)))
            await self._mesh.start()
        return self._mesh

    def drop(self) -> None:
        if self._mesh is not None:
            self._mesh.end()
            self._mesh = None

    def end(self) -> None:
        self.drop()
        self._scratch.cleanup()

    @asynccontextmanager
    async def lent(self, shape: MeshShape) -> AsyncIterator[PartsMesh]:
        """A whole mesh, which must be made whole again afterwards; a spoilt one is not lent on."""
        try:
            mesh = await self.get(shape)
            yield mesh
            await mesh.restore()
        except BaseException:
            if self._mesh is not None:
                print(self._mesh.describe())
            self.drop()
            raise


@asynccontextmanager
async def loaded(
    mesh: PartsMesh, truth: Truth, wanted: Sequence[Ask] = MANY, *, each: int = 4
) -> AsyncIterator[Load]:
    """Streams that are under way, `each` tokens far, when the block begins, and all right in the
    end: every token, in order, once."""
    await truth.learn(mesh.target, wanted)
    async with Load(mesh.target, wanted) as load:
        await load.until_tokens(each)
        unfinished = sum(not stream.finished for stream in load.streams)
        assert unfinished > len(wanted) // 2, f"only {unfinished} streams are left to disturb"
        yield load
        await load.finish()
    check(truth, load.streams)


def check(truth: Truth, streams: Sequence[Stream]) -> None:
    gaps = sorted(stream.longest_gap_s() for stream in streams)
    print(f"longest pauses of {len(gaps)} streams: {gaps[0]:.2f} to {gaps[-1]:.2f} s")
    assert truth.faults(streams) == []
