"""The mesh and the right answers that tests of this folder share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from support.chaos import THREE_AND_A_SPARE, Meshes, watched

from benchmarks.recovery.load import Truth
from benchmarks.recovery.parts_mesh import PartsMesh


@pytest.fixture(scope="session")
def truth() -> Truth:
    """Of the demo model, batch-invariant: the same on every mesh, however it is cut."""
    return Truth()


@pytest.fixture(scope="session")
def meshes() -> Iterator[Meshes]:
    shared = Meshes()
    yield shared
    shared.end()


@pytest_asyncio.fixture
async def mesh(meshes: Meshes) -> AsyncIterator[PartsMesh]:
    """Three stages and a spare."""
    async with watched(meshes.get(THREE_AND_A_SPARE)) as whole:
        yield whole
