"""The images are built once for all compose tests, in the way that users build them; most tests
share one mesh, as `docker compose up` starts it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.containers import BUILD_TIMEOUT_S, Project, require_engine, running_project


@pytest.fixture(scope="session")
def images() -> None:
    require_engine()
    Project().compose("build", timeout_s=BUILD_TIMEOUT_S)


@pytest.fixture(scope="session")
def mesh(images: None) -> Iterator[Project]:
    """Three stages and a spare; bit for bit the same answers whatever else is in the batch."""
    with running_project({"BATCH_INVARIANT": "1"}, num_stages=3) as running:
        yield running
